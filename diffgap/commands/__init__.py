"""Commands of ``diffgap``, a module each."""
