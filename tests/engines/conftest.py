"""Both models of a fixture, loaded, with everything that a comparison needs beside them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from modernbert_align.backends import hf
from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.backends.oracle import Oracle
from modernbert_align.backends.sources import resolve_model
from modernbert_align.core.convert import Request, convert
from modernbert_align.core.fixtures import Inputs, make_inputs
from modernbert_align.core.model_config import ModelConfig, parse_config, read_config_file
from modernbert_align.core.probes import Probe, load_probes
from modernbert_align.core.rows import MODES, Dtype, Mode, Record
from modernbert_align.core.table import Entry, load_table
from modernbert_align.engines import padiff_engine, reference_side, stream_engine
from modernbert_align.engines.reference_side import Nulls
from modernbert_align.engines.truth import Truth


@dataclass(kw_only=True)
class Models:
    """A candidate beside its reference."""

    name: str
    head: str
    dtype: Dtype
    candidate: Any
    reference: torch.nn.Module
    oracle: Oracle
    batch: Inputs
    probes: tuple[Probe, ...]
    config: ModelConfig
    entries: tuple[Entry, ...]
    load_candidate: Callable[[], Any]

    def with_new_candidate(self) -> "Models":
        """The same reference beside an unchanged candidate."""
        return replace(self, candidate=self.load_candidate())

    def nulls(self) -> Nulls:
        return reference_side.measure_nulls(self.reference, self.batch, self.probes)

    def padiff(self, mode: Mode, nulls: Nulls | None = None) -> padiff_engine.PassResult:
        """One pass with PaDiff."""
        with padiff_engine.clean_hooks(self.candidate, self.reference):
            return padiff_engine.run(
                self.candidate,
                self.reference,
                self.batch,
                self.probes,
                dtype=self.dtype,
                mode=mode,
                truth=Truth(self.oracle, self.batch),
                nulls={} if nulls is None else nulls,
            )

    def padiff_records(self, nulls: Nulls) -> tuple[Record, ...]:
        """Both passes with PaDiff."""
        return tuple(record for mode in MODES for record in self.padiff(mode, nulls).records)

    def stream_records(self) -> tuple[Record, ...]:
        """Everything in lock-step."""
        return stream_engine.run(self.candidate, self.reference, self.oracle, self.batch, self.probes, self.dtype)


Load = Callable[..., Models]


@pytest.fixture(scope="session")
def load_models(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Gives both models of a fixture; conversions are kept, models are not."""
    table = load_table()
    folders: dict[tuple[str, str], Path] = {}

    def load(name: str = "tiny", dtype: Dtype = "fp32", head: str = "masked_lm") -> Models:
        source = resolve_model(name, table, lambda _message: None, head)
        if (name, head) not in folders:
            out = tmp_path_factory.mktemp("converted") / f"{name}-{head}"
            request = Request(folder=source.folder, model=name, revision=None, src="hf", dst="paddle", head=head)
            folders[name, head] = convert(request, table, out, force=False).out
        config = parse_config(read_config_file(source.folder))
        architecture = table.architecture(head)
        reference = hf.load(source.folder, architecture, dtype)

        def load_candidate() -> Any:
            return paddle_backend.load(folders[name, head], architecture, dtype)

        return Models(
            name=name,
            head=head,
            dtype=dtype,
            candidate=load_candidate(),
            reference=reference,
            oracle=Oracle(config, head, reference),
            batch=make_inputs(source.inputs, config, head),
            probes=load_probes(config, head, table.prefix(head)),
            config=config,
            entries=table.expand(config, head),
            load_candidate=load_candidate,
        )

    return load
