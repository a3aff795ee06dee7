"""The compiled loop turns and copies no cache; a planted turn is found."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from ssd_jax.core.types import KVCache
from ssd_jax.decoding import engine, registry
from ssd_jax.performance import compiled
from tests.support import testkit as kit

_TURNS = ("copy", "transpose", "convert")
TEXT = """HloModule m
%turn (p.1: f32[2,8]) -> f32[8,2] {
  %p.1 = f32[2,8]{1,0} parameter(0)
  %transpose.1 = f32[8,2]{1,0} transpose(%p.1), dimensions={1,0}
  ROOT %bitcast.1 = f32[16]{0} bitcast(%transpose.1)
}

%body.1 (p.2: (s32[], f32[2,8])) -> (s32[], f32[2,8]) {
  %fusion.1 = f32[16]{0} fusion(%x), kind=kLoop, calls=%turn
  %copy.1 = bf16[2,8]{1,0} copy(%y)
  %convert.1 = f32[2]{0} convert(%z)
}

ENTRY %main (p.3: f32[2,8]) -> f32[2,8] {
  %w = (s32[], f32[2,8]) while(%t), condition=%c, body=%body.1
  %copy.2 = f32[2,8]{1,0} copy(%q)
}
"""


def test_moves_are_those_of_loops_and_of_fusions_roots():
  """Kinds and bytes of a text made by hand; the entry's copy is no loop's."""
  found = compiled.moves_in_loops(TEXT, at_least=32)
  assert [(x.kind, x.bytes) for x in found] == [("transpose", 64), ("copy", 32)]


NESTED = """HloModule m
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%layer (p: (s32[], f32[2,8])) -> (s32[], f32[2,8]) {
  %p = (s32[], f32[2,8]) parameter(0)
  %slice = f32[2,8]{1,0} dynamic-slice(%w, %i), dynamic_slice_sizes={2,8}
  %dot = f32[2,8]{1,0} custom-call(%slice), custom_call_target="__cublas$gemm"
  ROOT %t = (s32[], f32[2,8]) tuple(%i, %dot)
}

%pass (p: (s32[], f32[2,8])) -> (s32[], f32[2,8]) {
  %w.1 = (s32[], f32[2,8]) while(%t), condition=%c.1, body=%layer, backend_config={"known_trip_count":{"n":"4"}}
  %reduce = f32[] reduce(%x, %zero), dimensions={0}, to_apply=%add
  %copy.1 = f32[4]{0} copy(%y)
}

ENTRY %main (p: f32[2,8]) -> f32[2,8] {
  %w = (s32[], f32[2,8]) while(%t), condition=%c, body=%pass
  %copy.2 = f32[2,8]{1,0} copy(%q)
}
"""  # noqa: E501


def test_what_a_pass_starts_is_counted_in_its_layers_too():
  """Four layers of two, a reduction and a copy; what a reduction applies, and
  what runs before or after the loop, is none of them."""
  assert compiled.launches(NESTED) == 4 * 2 + 2
  move, = compiled.moves_in_loops(NESTED, at_least=64)
  assert (move.kind, move.bytes, move.count) == ("dynamic-slice", 64, 4)


class _SlotsLast:
  """A model whose cache is [L, S, K, H, X] between the passes."""

  def __init__(self, model):
    self.model = model

  def prefill(self, params, prompt, scratch):
    hidden, cache = self.model.prefill(params, prompt, scratch)
    return hidden, _turned(cache)

  def forward(self, params, cache, prompt, queries):
    hidden, cache = self.model.forward(
        params, _turned(cache), prompt, queries)
    return hidden, _turned(cache)


def _turned(cache):
  return KVCache(cache.k.swapaxes(3, 4), cache.v.swapaxes(3, 4))


def _moves(pipe, model, decoder):
  """(what the loop moves, bytes of a layer's keys, bytes of all keys)."""
  settings, guided = pipe.sampling()
  prompt, _ = pipe.family.encode_prompts(["ab"], guided)
  text = engine.decode.lower(
      model, decoder, pipe.params, prompt, settings, jax.random.key(0),
      jnp.arange(1)).compile(kit.HLO_ONLY).as_text()
  shapes = jax.eval_shape(
      lambda: pipe.model.prefill(
          pipe.params, prompt, decoder.scratch(model))[1])
  whole = shapes.k.size * shapes.k.dtype.itemsize
  layer = whole // shapes.k.shape[0]
  return compiled.moves_in_loops(text, layer), layer, whole


@pytest.mark.slow
@pytest.mark.as_users_compile
def test_no_pass_copies_the_cache():
  """No layer's keys are copied, turned or converted; never all are sliced."""
  pipe = kit.tiny(8, 8, heads=(0, 0), guidance=2.0)
  moves, _, whole = _moves(pipe, pipe.model, registry.parse("exact"))
  assert [x for x in moves if x.kind in _TURNS or x.bytes >= whole] == []


@pytest.mark.slow
@pytest.mark.as_users_compile
def test_a_cache_turned_around_in_each_pass_is_found():
  """The test above would fail if slots stood last in the cache."""
  pipe = kit.tiny(8, 8, heads=(0, 0), guidance=2.0)
  planted = _SlotsLast(pipe.model)
  model = dataclasses.replace(
      pipe.model, prefill=planted.prefill, forward=planted.forward)
  moves, layer, _ = _moves(pipe, model, registry.parse("ar"))
  assert [x for x in moves if x.kind in _TURNS and x.bytes >= layer]


HLO = """HloModule m
%body.1 (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %all-reduce.3 = f32[2,4]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3}}
  %ag = (bf16[1,8]{1,0}, bf16[4,8]{1,0}) all-gather-start(%y), replica_groups=[1,4]<=[4]
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%t), condition=%c, body=%body.1, backend_config={"known_trip_count":{"n":"5"}}
  %done = bf16[4,8]{1,0} all-gather-done(%ag)
  %all-reduce.4 = f32[10]{0} all-reduce(%z), replica_groups={{0,1,2,3}}
  %cp.1 = f32[4]{0} collective-permute(%a), channel_id=7
  %cp.2 = f32[4]{0} collective-permute(%b), channel_id=7
  %rs = f32[4]{0} reduce-scatter(%c), channel_id=8, replica_groups=mesh['x'=2,'y'=2] {'y'}
}
"""  # noqa: E501


def test_collectives_of_loops_count_as_often_as_they_run():
  """Kinds, counts, bytes and groups of a text made by hand."""
  found = {x.kind: x for x in compiled.collectives(HLO, 4)}
  assert found["all-reduce"] == compiled.Collective(
      "all-reduce", 5 + 1, 5 * 32 + 40, 4)
  assert found["all-gather"] == compiled.Collective("all-gather", 5, 5 * 64, 4)
  assert found["collective-permute"].count == 1  # two steps of one
  assert found["reduce-scatter"].group == 2
  # A ring of 4 sends each byte 1.5 times.
  assert found["all-reduce"].seconds(1.0, 0.0) == pytest.approx(300)
