"""Blind listening tests of generated sounds: one page for the listeners, and the statistics of their answers.

:mod:`~diffgap.listening.design` plans the trials, :mod:`~diffgap.listening.page` writes the page and its key,
:mod:`~diffgap.listening.answers` checks what comes back, :mod:`~diffgap.listening.score` counts it.
"""
