"""The sampler's programs, called as `algorithm.sample.sample_blocks` calls them."""

import dataclasses
from typing import Any

import jax
import numpy as np

from grpo_jax import models, sharding
from grpo_jax.engine import compaction, decode, sampling_params
from grpo_jax.run import abstract
from grpo_jax.run.setup import Setup, stopping
from grpo_jax.run.stages import Call
from grpo_jax.types import Params, Sampling


@dataclasses.dataclass(frozen=True)
class Sample:
    """Sampling of a batch of prompts.

    Attributes:
      setup: the run.
      shape: B, G, P, T.
      sampling: of the tokens.
      weights: 'model' or 'int8'.
      record: what the rollout holds, see `types.Rollout`.
    """

    setup: Setup
    shape: abstract.Shape
    sampling: Sampling
    weights: str = 'model'
    record: tuple[str, ...] = ()

    @property
    def _in_place(self) -> bool:
        with sharding.use(self.setup.mesh):
            return models.caches_in_place(self.setup.model.config)

    @property
    def _block(self) -> int:
        return decode.block_size(self.shape[3], in_place=self._in_place)

    @property
    def _model(self) -> models.Transformer:
        return self.setup.model.clone(unrolled=self._in_place)

    def conversion(self, params: Params) -> Call | None:
        """The call that makes the weights to sample with; None: they are used as they are."""
        setup = self.setup
        options = sampling_params.conversion(
            params, setup.model.config.dtype, self.weights, self._in_place,
            mesh=setup.mesh, gather=setup.config.mesh.gather,
        )  # fmt: skip
        return None if options is None else Call(sampling_params.convert, (params,), options)

    @property
    def width(self) -> int:
        """Columns of the first block."""
        return min(self._block, self.shape[3])

    @property
    def blocks(self) -> int:
        """How many blocks follow the first one."""
        return -(-self.shape[3] // self._block) - 1

    @property
    def last_width(self) -> int:
        """Columns of the last block."""
        return self.shape[3] - self.blocks * self._block

    def first(self, params: Params) -> Call:
        """The call that reads the prompts and decodes the first columns."""
        setup, (groups, group_size, length, columns) = self.setup, self.shape
        width = self.width
        where = sharding.whole_groups(groups, setup.mesh)
        ends: Any
        ends, table = stopping(setup.config, setup.model, setup.tokenizer, setup.ends, setup.hidden)
        stops: Any = None
        if table is not None:
            everywhere = sharding.replicated(setup.mesh)
            stops = jax.ShapeDtypeStruct(table.shape, table.dtype, sharding=everywhere)
        absent: Any = None
        inputs = compaction.DecodeInputs(
            params, abstract.prompts(self.shape, where), absent, self.sampling, ends, stops
        )
        shape = compaction.first_shape(groups, group_size, setup.mesh)
        thresholds = compaction.NEVER_COMPACT
        if width < columns:
            thresholds = compaction.compaction_thresholds(shape, length, width)
        options = {
            'group_size': group_size, 'max_tokens': columns, 'width': width, 'record': self.record,
            'mesh': setup.mesh,
        }  # fmt: skip
        return Call(decode.first_block, (self._model, inputs, 0, 0, thresholds), options)

    def last(self, params: Params, results: Any) -> Call:
        """The call that decodes the last columns of all completions.

        Args:
          params: the weights.
          results: of the first block's call, abstract arrays with shardings.
        """
        inputs, _, slots, state = results
        grown = jax.tree.map(lambda x: _resized(x, self.shape[3]), slots.cache)
        slots = slots._replace(cache=grown)
        arguments = self._model, params, inputs, slots, state, (np.int32(0), np.int32(0))
        options = {'width': self.shape[3], 'mesh': self.setup.mesh}
        return Call(decode.next_block, arguments, options)


def _resized(x: Any, columns: int) -> Any:
    """A cache [..., columns, h] of another number of columns."""
    shape = (*x.shape[:-2], columns, x.shape[-1])
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)
