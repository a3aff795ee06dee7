"""Comparison of our decoders with `transformers` on one trunk.

The trunk is transformers' Llama with random weights; ours is built from its
tensors. All generate greedily where tokens are compared. In each round every
contender generates once, in a rotating order, so that a slow minute affects all
of them equally.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from ssd_jax.convert import recipes
from ssd_jax.core.config import check
from ssd_jax.core.extras import need
from ssd_jax.core.grid import Grid
from ssd_jax.core.protocols import Decoder
from ssd_jax.core.types import Model, Params, Prompt
from ssd_jax.decoding import engine
from ssd_jax.decoding.sampling import Sampling
from ssd_jax.models import rope
from ssd_jax.models.generator import Generator
from ssd_jax.models.layouts import inference_layout
from ssd_jax.models.transformer import TrunkConfig

_THETA = 10_000.0
_EXTRA = "parity"


@dataclasses.dataclass(frozen=True)
class Setting:
  """A trunk and the images that it generates.

  Attributes:
    layers: Number of layers L.
    width: Width D; the feed-forward part is 8/3 as wide, as Llama's.
    head_dim: Width of a head H.
    vocab: Size V of the token vocabulary and of the input table.
    tokens: Tokens of an image, a square number.
    prompt: Tokens of the prompt.
    batch: Images generated together.
    dtype: "float32" or "bfloat16".
    seed: Seed of weights, prompts and samples.
  """

  layers: int
  width: int
  head_dim: int
  vocab: int
  tokens: int
  prompt: int
  batch: int
  dtype: str
  seed: int = 0

  def __post_init__(self):
    for name in ("layers", "width", "head_dim", "tokens", "prompt", "batch"):
      check(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
    check(self.vocab >= 2, "vocab", self.vocab, ">= 2")
    check(math.isqrt(self.tokens) ** 2 == self.tokens, "tokens", self.tokens,
          "a square, such as 256")
    check(self.width % self.head_dim == 0 and self.head_dim % 2 == 0, "width",
          self.width, f"a multiple of even heads ({self.head_dim})")

  @property
  def trunk(self) -> TrunkConfig:
    """Llama's shape: no biases, no grouped queries, a separate output head."""
    heads = self.width // self.head_dim
    hidden = -(-8 * self.width // 3 // 256) * 256
    return TrunkConfig(
        self.width, self.layers, heads, heads, self.head_dim, hidden,
        self.vocab, self.vocab)

  @functools.cached_property
  def grid(self) -> Grid:
    """The square grid of the tokens."""
    side = math.isqrt(self.tokens)
    return Grid(side, side)

  @functools.cached_property
  def prompts(self) -> np.ndarray:
    """Random prompt ids, int64 [B, P]."""
    rng = np.random.default_rng(self.seed)
    return rng.integers(0, self.vocab, (self.batch, self.prompt))


@dataclasses.dataclass(frozen=True)
class Generation:
  """One generated batch.

  Attributes:
    seconds: Total time, the prompt's pass included.
    passes: Forward passes of the trunk.
    tokens: int [B, N], generated tokens.
  """

  seconds: float
  passes: int
  tokens: np.ndarray


class TransformersBaseline:
  """Generation with transformers' Llama.

  Attributes:
    model: The Llama model.
  """

  def __init__(self, setting: Setting):
    self._setting, cfg = setting, setting.trunk
    self._torch = need("torch", _EXTRA)
    transformers = need("transformers", _EXTRA)
    self._torch.manual_seed(setting.seed)
    config = transformers.LlamaConfig(
        vocab_size=cfg.vocab_in, hidden_size=cfg.d_model,
        intermediate_size=cfg.d_ff, num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads, num_key_value_heads=cfg.n_kv_heads,
        head_dim=cfg.head_dim, rms_norm_eps=cfg.norm_eps,
        max_position_embeddings=setting.prompt + setting.tokens,
        rope_parameters={"rope_type": "default", "rope_theta": _THETA},
        initializer_range=cfg.d_model**-0.5, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None)
    device = "cuda" if self._torch.cuda.is_available() else "cpu"
    with self._torch.device(device):
      self.model = transformers.AutoModelForCausalLM.from_config(
          config, dtype=getattr(self._torch, setting.dtype)).eval()
    self._forward = self.model.forward
    self._ids = self._torch.tensor(setting.prompts, device=device)

  def compile(self) -> str | None:
    """Generates with the compiled forward pass; returns the error, or None."""
    try:
      self.generate(True)
    except RuntimeError as error:  # the base of all torch.compile errors
      lines = str(error).strip().splitlines() or [type(error).__name__]
      return lines[0][:100].replace("|", "/")  # shown in a table
    return None

  def generate(self, is_compiled: bool) -> Generation:
    """Generates a batch greedily, with a static cache."""
    self.model.forward = self._compiled if is_compiled else self._forward
    start = time.perf_counter()
    found = self.model.generate(
        self._ids, attention_mask=self._torch.ones_like(self._ids),
        do_sample=False, max_new_tokens=self._setting.tokens,
        cache_implementation="static", disable_compile=True)
    tokens = found[:, self._setting.prompt:].cpu().numpy()
    seconds = time.perf_counter() - start
    return Generation(seconds, self._setting.tokens, tokens)

  @functools.cached_property
  def _compiled(self):
    return self._torch.compile(self._forward, mode="reduce-overhead")


class OurDecoders:
  """Generation with our decoders on the same trunk.

  Attributes:
    model: Functions of the trunk.
    params: Parameters of the trunk.
  """

  def __init__(self, setting: Setting, theirs: TransformersBaseline):
    cfg, slots = setting.trunk, setting.prompt + setting.tokens
    generator = Generator(
        cfg, setting.grid, rope.table_1d(slots, cfg.head_dim, _THETA),
        np.arange(cfg.vocab_in, dtype=np.int32), jnp.dtype(setting.dtype))
    self._setting = setting
    self.model: Model = generator.model()
    self.params = inference_layout(read_llama(cfg, theirs.model.state_dict()))
    rows = (setting.batch, setting.prompt)
    self._prompt = Prompt(
        jnp.asarray(setting.prompts, jnp.int32), jnp.ones(rows, bool),
        jnp.broadcast_to(jnp.arange(slots), (setting.batch, slots)))

  def generate(self, decoder: Decoder, temperature: float) -> Generation:
    """Generates a batch; greedily at temperature 0."""
    start = time.perf_counter()
    found = engine.decode(
        self.model, decoder, self.params, self._prompt,
        Sampling.make(temperature=temperature),
        jax.random.key(self._setting.seed), jnp.arange(self._setting.batch))
    tokens = np.asarray(found.tokens).reshape(self._setting.batch, -1)
    seconds = time.perf_counter() - start
    return Generation(seconds, int(found.passes.max()), tokens)

  def queries(self, decoder: Decoder) -> int:
    """Returns the number of slots that a pass of the decoder feeds."""
    return engine.count_queries(
        self.model, decoder, self.params, self._prompt, Sampling.make(),
        self._setting.batch)


def read_llama(cfg: TrunkConfig, tensors: dict[str, Any]) -> Params:
  """Returns {"trunk": ...} from a Llama's torch tensors, in their dtype."""
  size = (cfg.vocab_in, cfg.d_model)
  rows = [recipes.table_rows("model.embed_tokens.weight", *size),
          *recipes.llama_layers(cfg, "model."),
          recipes.image_head("lm_head.weight", size, 0, cfg.vocab_out)]
  parts: dict[str, list[np.ndarray]] = {}
  stacked = {row.target for row in rows if row.layer is not None}
  for row in rows:
    x = row.convert(_numpy(tensors[row.sources[0].name]))
    parts.setdefault(row.target, []).append(x)
  params: Params = {}
  for target, arrays in parts.items():
    *folders, name = target.split("/")
    parent = functools.reduce(lambda d, k: d.setdefault(k, {}), folders, params)
    parent[name] = jnp.asarray(
        np.stack(arrays) if target in stacked else arrays[0])
  return params


def _numpy(tensor: Any) -> np.ndarray:
  tensor = tensor.detach().cpu()
  if str(tensor.dtype) == "torch.bfloat16":
    return tensor.view(need("torch", _EXTRA).int16).numpy().view(
        ml_dtypes.bfloat16)
  return tensor.numpy()


@dataclasses.dataclass(frozen=True)
class Contender:
  """A decoder or baseline in the comparison.

  Attributes:
    label: Label in the table.
    generate: Generates a batch.
    queries: Slots that a pass feeds.
  """

  label: str
  generate: Callable[[], Generation]
  queries: int = 1


def race(
    contenders: Sequence[Contender], rounds: int,
    on_step: Callable[[str], None] = lambda label: None,
) -> list[list[Generation]]:
  """Returns the generations of each contender, one per round.

  Each contender generates once before the first round, which is not counted.

  Args:
    contenders: Decoders and baselines.
    rounds: Number of rounds.
    on_step: Called with a contender's label before it generates.
  """
  check(rounds >= 1, "rounds", rounds, ">= 1")
  found: list[list[Generation]] = [[] for _ in contenders]
  for turn in range(-1, rounds):
    for offset in range(len(contenders)):
      index = (offset + turn) % len(contenders)
      on_step(contenders[index].label)
      generation = contenders[index].generate()
      if turn >= 0:
        found[index].append(generation)
  return found
