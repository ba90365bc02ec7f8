"""The declared grid of an ablation: variants of one configuration, each trained under several seeds.

preset: recommended                 # optional: the bridge settings that everything starts from
base: {data: {path: stamps}}        # optional: fields of RunConfig that every variant has
seeds: [0, 1, 2]                    # split seeds of the bundled data; train.seed of any other store
reference: recommended              # optional: the variant that the others are compared with; the first by default
variants:
  recommended: {}
  deeper: {bridge.depth: 4}         # dotted or nested; wins over base
  paper: {preset: paper}            # another preset under the same base
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from diffgap._files import check_writable
from diffgap.models.settings import BridgeSettings
from diffgap.training.config import BUNDLED, RunConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]*")
_KEYS = ("base", "seeds", "reference", "variants")


@dataclass(frozen=True)
class GridRun:
    """One variant under one seed."""

    variant: str
    seed: int
    config: RunConfig

    def __str__(self) -> str:
        return f"{self.variant}, seed {self.seed}"

    def folder(self, output: Path) -> Path:
        """Its run folder below the folder of the ablation."""
        return output / self.variant.replace(" ", "-") / f"seed{self.seed}"


@dataclass(frozen=True)
class Grid:
    """A grid file, read and checked.

    Attributes:
        reference: The variant that the others are compared with.
        seeds: Each variant is trained under each.
        variants: By name, the configuration before a seed is put in.
    """

    reference: str
    seeds: tuple[int, ...]
    variants: dict[str, RunConfig]

    @classmethod
    def load(cls, source: str, *, steps: int | None = None) -> Grid:
        """Read a grid file, or the bundled grid of that name.

        Args:
            source: A YAML file, or "paper".
            steps: Replaces ``train.steps`` everywhere.

        Raises:
            FileNotFoundError: Neither a file nor a bundled grid.
            ValueError: Not YAML, or a field, variant or seed that is wrong; the message names it.
        """
        try:
            content = yaml.safe_load(_read(source))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{source} is not YAML ({' '.join(str(error).split())[:120]})") from error
        content = _mapping(content, source, _KEYS)
        declared = _mapping(content.get("variants"), f"{source}: variants")
        if not declared:
            raise ValueError(f"{source}: variants is empty; name at least the reference")
        base = _nested(_mapping(content.get("base", {}), f"{source}: base"))
        variants = {}
        for name, changes in declared.items():
            where = f"{source}: variant {name!r}"
            if not _NAME.fullmatch(name):
                raise ValueError(f"{where}: the name is also a folder; use letters, digits, space and . _ + -")
            variants[name] = _configuration(_merged(base, _nested(_mapping(changes, where))), where, steps)
        folders = [name.replace(" ", "-") for name in variants]
        if len(set(folders)) < len(folders):
            raise ValueError(f"{source}: two variants differ in spaces and - alone; rename one")
        reference = content.get("reference", next(iter(variants)))
        if reference not in variants:
            raise ValueError(f"{source}: reference {reference!r} is no variant; use one of {', '.join(variants)}")
        return cls(reference, _seeds(content.get("seeds", [0]), source), variants)

    def twins(self) -> dict[str, str]:
        """Each variant with the one whose runs it uses: itself, or the reference or an earlier one that is the same."""
        first: dict[RunConfig, str] = {self.variants[self.reference]: self.reference}
        return {name: first.setdefault(config, name) for name, config in self.variants.items()}

    def runs(self) -> Iterator[GridRun]:
        """What is to be trained: all variants under the first seed, then under the next, so that a table can be made
        early; the reference first, because nothing can be said without it."""
        twins = self.twins()
        distinct = [name for name in self.variants if twins[name] == name and name != self.reference]
        for seed in self.seeds:
            for name in (self.reference, *distinct):
                yield GridRun(name, seed, with_seed(self.variants[name], seed))

    def changes(self, variant: str) -> dict[str, Any]:
        """The fields in which a variant differs from the reference, dotted, with its values."""
        own, reference = self.variants[variant], self.variants[self.reference]
        return {name: _at(own.to_dict(), name) for name in own.differences(reference)}

    def check_output(self, output: Path) -> None:
        """Whether the runs below ``output`` are those of this grid; runs of variants it no longer has are ignored.

        Raises:
            ValueError: One of them has another configuration; the message names the field. Or nothing can be written
                there.
        """
        check_writable(output, output / "ablation.md")
        for run in self.runs():
            file = run.folder(output) / "config.yaml"
            if file.is_file():
                changes = RunConfig.load(file).changes_to(run.config)
                if changes:
                    raise ValueError(
                        f"{run.folder(output)} was trained with {changes}; delete that folder, or choose another "
                        "output folder"
                    )


def with_seed(config: RunConfig, seed: int) -> RunConfig:
    """The configuration under a seed: another split of the bundled data, other weights and noise on any other store."""
    if config.data.path in BUNDLED:
        return replace(config, data=replace(config.data, split_seed=seed))
    return replace(config, train=replace(config.train, seed=seed))


def _read(source: str) -> str:
    if Path(source).is_file():
        return Path(source).read_text(encoding="utf-8")
    bundled = files("diffgap.training") / "grids"
    names = sorted(entry.name.removesuffix(".yaml") for entry in bundled.iterdir() if entry.name.endswith(".yaml"))
    if source not in names:
        raise FileNotFoundError(f"grid {source} is neither a file nor a bundled grid ({', '.join(names)})")
    return (bundled / f"{source}.yaml").read_text(encoding="utf-8")


def _configuration(content: dict[str, Any], where: str, steps: int | None) -> RunConfig:
    try:
        start = RunConfig(bridge=BridgeSettings.preset(content.pop("preset", "recommended"))).to_dict()
        config = RunConfig.from_dict(_merged(start, content), where)
        return config if steps is None else replace(config, train=replace(config.train, steps=steps))
    except ValueError as error:
        raise ValueError(str(error) if where in str(error) else f"{where}: {error}") from error


def _seeds(seeds: Any, source: str) -> tuple[int, ...]:
    if not isinstance(seeds, list) or not seeds or any(type(seed) is not int for seed in seeds):
        raise ValueError(f"{source}: seeds is {seeds!r}; give a list of whole numbers")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{source}: seeds {seeds} repeats one; a run counted twice makes intervals too narrow")
    return tuple(seeds)


def _mapping(content: Any, where: str, known: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{where}: expected a mapping of names, got {type(content).__name__}")
    unknown = sorted(set(content) - set(known)) if known else []
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known keys are {', '.join(known)}")
    return content


def _nested(content: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as nested mappings: {"bridge.depth": 4} as {"bridge": {"depth": 4}}."""
    tree: dict[str, Any] = {}
    for name, value in content.items():
        for part in reversed(name.split(".")):
            value = {part: value}
        tree = _merged(tree, value)
    return tree


def _merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(tree)
    for name, value in changes.items():
        old = merged.get(name)
        merged[name] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _at(tree: Any, name: str) -> Any:
    for part in name.split("."):
        tree = tree[part]
    return tree
