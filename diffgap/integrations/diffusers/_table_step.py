"""What the schedulers share: which row of the table a step is, and its application."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffgap.diffusion.table import Row, build_table
from diffgap.ops.solver_step import StepOutput, solver_step

VP_PREDICTIONS = ("epsilon", "sample", "v_prediction")


class TableStep:
    """What all schedulers here share. The table is None where diffusers' own ``step`` is to be used."""

    timesteps: Tensor
    _table: Tensor | None = None
    #: The timesteps as numbers.
    _times: tuple[float, ...] = ()

    def _host_value(self, timestep: float | Tensor) -> float | None:
        """The timestep as a number, or None where only the device knows it."""
        if not isinstance(timestep, Tensor):
            return timestep
        if torch.compiler.is_compiling() or timestep.numel() != 1:
            return None
        if timestep.device.type == "cpu":
            return timestep.item()
        if timestep.untyped_storage().data_ptr() != self.timesteps.untyped_storage().data_ptr():
            return None
        return self._times[timestep.storage_offset() - self.timesteps.storage_offset()]

    def _apply(
        self,
        table: Tensor,
        step: int | Tensor,
        sample: Tensor,
        output: Tensor,
        history: Sequence[Tensor] = (),
        last_sample: Tensor | None = None,
        x0_clamp: float | None = None,
    ) -> StepOutput:
        """One step, in the wider of the dtypes of ``sample`` and ``output``, as diffusers promotes them."""
        dtype = torch.promote_types(sample.dtype, output.dtype)
        return solver_step(
            sample.to(dtype), output, table, step, last_sample=last_sample, history=history, x0_clamp=x0_clamp
        )


class ByIndex(TableStep):
    """Schedulers with a counter, ``step_index``, that is the row of the table."""

    config: Any
    sigmas: Tensor
    _step_index: int | None
    _begin_index: int | None
    #: The sigmas that the table was made from, as a caller may put others in their place, and the same as numbers.
    _sigmas: Tensor | None = None
    _levels: tuple[float, ...] = ()
    _rows: Tensor | None = None
    _table_begin = 0

    def _start(self) -> None:
        """Build the table for the timesteps and sigmas that were set."""
        self._times = tuple(self.timesteps.tolist())
        self._sigmas = self.sigmas
        self._levels = tuple(self.sigmas.tolist())
        self._tabulate(0, self.timesteps.device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """As diffusers'; a multistep solver warms up from there."""
        super().set_begin_index(begin_index)  # type: ignore[misc]
        # Once sampling runs diffusers has no more use for it.
        if self._table is not None and self._step_index is None and begin_index != self._table_begin:
            self._tabulate(begin_index, self._table.device)

    def _tabulate(self, begin: int, device: torch.device) -> None:
        rows = self._table_rows(self._levels, begin) if all(map(math.isfinite, self._levels)) else None
        self._table_begin = begin
        if rows is None:
            self._table = None
            return
        # Rows before ``begin`` are not visited.
        table = build_table(type(self).__name__, torch.tensor(self._times), [], [*([{}] * begin), *rows])
        self._table = table.coefficients.to(device, non_blocking=True)
        self._rows = torch.arange(len(self._table), device=device)

    def _table_rows(self, sigmas: Sequence[float], begin: int) -> list[Row] | None:
        """The rows from ``begin`` on, or None where they cannot be expressed; each scheduler has its own."""
        raise NotImplementedError

    def _tabled(self) -> bool:
        return self._table is not None and self.sigmas is self._sigmas

    def _locate(self, timestep: float | Tensor, sample: Tensor) -> tuple[Tensor, int | Tensor]:
        """The table on the sample's device and the row to apply; checks the order of the steps."""
        index = self._step_index
        compiling = torch.compiler.is_compiling()
        value = None if compiling else self._host_value(timestep)
        if index is None:
            if self._begin_index is None and value is not None and value in self._times:
                places = [i for i, time in enumerate(self._times) if time == value]
                index = places[1] if len(places) > 1 else places[0]  # diffusers' rule for repeated timesteps
                self._step_index = index
            else:
                self._init_step_index(timestep)  # type: ignore[attr-defined]
                index = self._step_index
                assert index is not None
            if index != self._table_begin:
                self._tabulate(index, sample.device)
        elif index >= len(self._times):
            raise ValueError(f"step: all {len(self._times)} steps are taken; call set_timesteps to start again")
        elif value is not None and value != self._times[index] and value in self._times:
            raise ValueError(f"timestep: step {index} is that of timestep {self._times[index]}, got {value}")
        assert self._table is not None and self._rows is not None
        if self._table.device != sample.device:
            self._table = self._table.to(sample.device, non_blocking=True)
            self._rows = self._rows.to(sample.device, non_blocking=True)
        if compiling:  # an int would have every step compiled anew
            return self._table, self._rows.narrow(0, index, 1).expand(len(sample))
        return self._table, index
