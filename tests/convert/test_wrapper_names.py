"""Names of tensors and files, as trainers and systems leave them."""

import pathlib

import pytest

from ssd_jax.convert import checkpoint_files, wrapper_names
from ssd_jax.convert.checkpoint_files import Checkpoint
from ssd_jax.convert.tensors import SafeTensor
from ssd_jax.core.config import UserError

FILE = pathlib.Path("model.pt")
EXPECTED = ("layers.0.attention.weight", "layers.1.attention.weight", "norm")


def checkpoint(*found):
  return Checkpoint(
      {name: SafeTensor(FILE, name, (), "float32") for name in found}, (FILE,))


@pytest.mark.parametrize("wrap", [
    lambda x: x, lambda x: f"module.{x}", lambda x: f"_orig_mod.module.{x}",
    lambda x: f"_forward_module._orig_mod.{x}", lambda x: f"model.{x}",
    lambda x: f"module.generator.trunk.{x}",
    lambda x: "_fsdp_wrapped_module." + x.replace(
        "attention", "_checkpoint_wrapped_module._fsdp_wrapped_module."
        "attention")])
def test_what_trainers_put_around_names_is_taken_off(wrap):
  """Prefixes of DDP, DeepSpeed, FSDP, torch.compile, Lightning, also nested."""
  found = wrapper_names.unwrapped(checkpoint(*map(wrap, EXPECTED)), EXPECTED)
  assert {plain: x.name for plain, x in found.tensors.items()} == {
      x: wrap(x) for x in EXPECTED}


def test_what_is_beside_a_prefixed_model_is_left():
  """All names are there under one prefix: the rest is of other parts."""
  found = wrapper_names.unwrapped(
      checkpoint("loss.a", *(f"model.{x}" for x in EXPECTED)), EXPECTED)
  assert set(found.tensors) == set(EXPECTED)


@pytest.mark.parametrize("found, said", [
    ([f"{part}.{x}" for part in ("ema", "model") for x in EXPECTED],
     "prefixes 'ema.', 'model.'"),
    ([*EXPECTED, "module.norm"], "'norm' and 'module.norm' in model.pt")])
def test_two_models_are_no_choice_of_ours(found, said):
  """Two names that become one are an error that names both."""
  with pytest.raises(UserError, match=said):
    wrapper_names.unwrapped(checkpoint(*found), EXPECTED)


def test_a_missing_tensor_is_named_without_the_prefix():
  """What differs is reported in the recipe's own words."""
  found = wrapper_names.unwrapped(
      checkpoint(*(f"model.{x}" for x in EXPECTED[:2])), EXPECTED)
  assert set(found.tensors) == set(EXPECTED[:2])


def test_files_beside_the_weights_are_left():
  """Trainers' files, system files and variants of a file are not read."""
  weights = ["a/model-00001-of-00002.safetensors", "model.safetensors",
             "only.fp16.safetensors", "pytorch_model.bin"]
  others = ["._model.safetensors", "a/._x.bin", "model.fp16.safetensors",
            "optimizer.bin", "scheduler.bin", "training_args.bin", "optim.bin",
            "a/zero_pp_rank_0_mp_rank_00_optim_states.pt"]
  assert checkpoint_files.published(weights + others) == weights
