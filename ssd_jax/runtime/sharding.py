"""The mesh, and where every array lies on it: the only file that names axes.

  data    rows: images, and guidance streams of an image
  fsdp    rows too, and parameters, which are gathered layer by layer
  tensor  attention heads, hidden widths, image codes

The mesh is JAX's own, set by `jax.set_mesh(make_mesh("data=2,tensor=4"))`.
Everything below `place`, `create` and `constrain` follows from it by XLA's
partitioner; without a mesh they change nothing. Results do not depend on it.
"""

from collections.abc import Callable, Sequence
import contextlib
import math
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from ssd_jax.core.config import UserError
from ssd_jax.core.types import KVCache
from ssd_jax.core.weights import path_of, weight_of

AXES = ("data", "fsdp", "tensor")
_ROWS = ("data", "fsdp")

# What a dimension is -> the mesh axes that share it.
_LOGICAL = {
    "embed": ("fsdp",),
    "width": ("fsdp", "tensor"),
    "heads": ("tensor",),
    "hidden": ("tensor",),
    "codes": ("tensor",),
    None: (),
}


def parse(text: str) -> dict[str, int]:
  """Sizes of all axes from "data=2,tensor=4"; what is not named is 1.

  Raises:
    UserError: on another axis or a size that is no positive number.
  """
  sizes = dict.fromkeys(AXES, 1)
  for part in filter(None, text.split(",")):
    name, _, size = part.partition("=")
    if name not in sizes or not size.isdigit() or int(size) < 1:
      raise UserError(
          f"Expected AXIS=NUMBER with an axis of {', '.join(AXES)}, got "
          f"{part!r} in mesh {text!r}. Write it as data=2,fsdp=1,tensor=4.")
    sizes[name] = int(size)
  return sizes


def make_mesh(text: str = "", devices: Sequence[Any] | None = None) -> Mesh:
  """The mesh that a text such as "data=2,tensor=4" names.

  Args:
    text: Sizes of axes; "" lets all devices share rows.
    devices: That form it; all by default. One host may use some of its own,
      several hosts use all of theirs.

  Raises:
    UserError: when there are too few devices, or hosts would be left out.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = parse(text or f"data={len(devices)}")
  count = math.prod(sizes.values())
  hosts = {device.process_index for device in devices}
  if count > len(devices) or (len(hosts) > 1 and count != len(devices)):
    raise UserError(
        f"Expected {'at most ' if len(hosts) == 1 else ''}the {len(devices)} "
        f"that are here, got mesh {text!r} of {count} devices. Change its "
        "sizes.")
  # Automatic axes: XLA's partitioner follows the arrays' places.
  return jax.make_mesh(tuple(sizes.values()), AXES, (AxisType.Auto,) * 3,
                       devices=devices[:count])


def current() -> Mesh | None:
  """The mesh that is set, if any."""
  mesh = jax.sharding.get_mesh()
  return None if mesh.empty else mesh


def cpu_mesh(rows: int, queries: int) -> Mesh | None:
  """A mesh of the CPU's devices that share the rows of a pass, if they should.

  XLA runs the small products of a pass mostly on one core; devices draw their
  rows side by side. Not where a mesh is set, or where each device would get so
  few queries that the weights are all it reads (fewer than 4, measured).

  Args:
    rows: Images times guidance streams.
    queries: Of a row in a pass.
  """
  is_free = current() is None and jax.process_count() == 1
  if jax.default_backend() != "cpu" or not is_free:
    return None
  parts = max((n for n in range(2, len(jax.devices()) + 1)
               if rows % n == 0 and rows * queries >= 4 * n), default=1)
  return None if parts == 1 else make_mesh(f"data={parts}")


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
  """With the mesh set; with None, nothing changes."""
  return jax.set_mesh(mesh) if mesh else contextlib.nullcontext()


def replicate(tree: Any, mesh: Mesh) -> Any:
  """Arrays of one CPU device on all of a mesh, in the memory where they are."""

  def shared(x):
    host = np.asarray(x)  # a view, which a device of the CPU reads in place
    return jax.make_array_from_single_device_arrays(
        x.shape, NamedSharding(mesh, PartitionSpec()),
        [jax.device_put(host, device) for device in mesh.devices.flat])

  return jax.tree.map(shared, tree)


def num_row_shards(mesh: Any = None) -> int:
  """Into how many parts rows are cut, inside jit too."""
  mesh = mesh or jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else math.prod(mesh.shape[a] for a in _ROWS)


def even_batch(batch: int, streams: int) -> int:
  """The batch, or the next larger one whose rows the mesh shares evenly."""
  parts = num_row_shards()
  step = parts // math.gcd(parts, streams)
  return -(-batch // step) * step


def num_param_shards() -> int:
  """Into how many parts large parameters are cut."""
  mesh = current()
  return 1 if mesh is None else mesh.shape["fsdp"] * mesh.shape["tensor"]


def spec(path: str, shape: Sequence[int], mesh: Any) -> PartitionSpec:
  """Where a parameter lies.

  Args:
    path: Its keys, joined by "/".
    shape: Of the array.
    mesh: Of the axes.

  Raises:
    UserError: when a dimension cannot be shared evenly.
  """
  weight = weight_of(path, len(shape))
  if weight is None:
    return PartitionSpec()
  each = (None,) * (len(shape) - len(weight.axes)) + weight.axes
  axes = [tuple(a for a in _LOGICAL[n] if mesh.shape[a] > 1) for n in each]
  for place, (size, shared) in enumerate(zip(shape, axes, strict=True)):
    _check_even(f"dimension {place} of {path}", size, shared, mesh)
  return PartitionSpec(*(shared or None for shared in axes))

def _check_even(
    what: str, size: int, axes: tuple[str, ...], mesh: Any
) -> None:
  """Raises UserError unless the axes share `size` things evenly."""
  ways = {axis: mesh.shape[axis] for axis in axes}
  if size % math.prod(ways.values()) == 0:
    return
  for axis in reversed(axes):
    others = math.prod(n for name, n in ways.items() if name != axis)
    fits = [n for n in range(1, ways[axis]) if size % (n * others) == 0]
    if fits:
      break
  raise UserError(
      f"Expected {'*'.join(axes)} to divide {size}, {what}, got mesh "
      f"{','.join(f'{k}={v}' for k, v in ways.items())}. Use "
      f"{axis}={max(fits, default=1)}.")


def shardings(tree: Any, mesh: Any) -> Any:
  """NamedShardings of a tree of parameters or of a training state."""
  return jax.tree_util.tree_map_with_path(
      lambda path, x: NamedSharding(mesh, spec(path_of(path), x.shape, mesh)),
      tree)


def shard_params(tree: Any, mesh: Mesh | None = None) -> Any:
  """The tree of parameters as arrays on the mesh, if one is set.

  Every host holds the whole tree and hands over its devices' parts.
  """
  mesh = mesh or current()
  if mesh is None:
    return jax.tree.map(jax.numpy.asarray, tree)
  return jax.tree.map(_spread, tree, shardings(tree, mesh))


def _spread(x: Any, sharding: NamedSharding) -> jax.Array:
  if isinstance(x, jax.Array) and x.sharding == sharding:
    return x
  if jax.process_count() == 1:
    return jax.device_put(x, sharding)
  x = fetch(x)
  return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])


def create(function: Callable[..., Any], *args: Any) -> Any:
  """What `function(*args)` returns, its arrays made where they lie."""
  mesh = current()
  if mesh is None:
    return function(*args)
  places = shardings(jax.eval_shape(function, *args), mesh)
  return jax.jit(function, out_shardings=places)(*args)


def constrain(tree: Any) -> Any:
  """Inside jit: the tree of parameters, kept in its places."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return tree
  return jax.tree_util.tree_map_with_path(
      lambda path, x: jax.lax.with_sharding_constraint(
          x, spec(path_of(path), x.shape, mesh)), tree)


def rows_spec(count: int, ndim: int, mesh: Any, axis: int = 0) -> PartitionSpec:
  """Rows over data and fsdp; whole where these do not share them evenly."""
  if count % num_row_shards(mesh):
    return PartitionSpec()
  return PartitionSpec(*(None,) * axis, _ROWS, *(None,) * (ndim - axis - 1))


def cache_spec(shape: Sequence[int], mesh: Any) -> PartitionSpec:
  """Of keys or values [L, S, K, X, H]: rows and key/value heads."""
  rows, heads = rows_spec(shape[1], 5, mesh, 1), shape[2]
  shared = "tensor" if heads % mesh.shape["tensor"] == 0 else None
  own = rows[1] if len(rows) else None
  return PartitionSpec(None, own, shared, None, None)


def constrain_cache(cache: KVCache) -> KVCache:
  """Inside jit: the cache, cut by rows and heads."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not isinstance(cache, KVCache):
    return cache
  return jax.tree.map(
      lambda x: jax.lax.with_sharding_constraint(x, cache_spec(x.shape, mesh)),
      cache)


def constrain_rows(tree: Any) -> Any:
  """Inside jit: arrays that lead with rows, cut by them."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return tree
  return jax.tree.map(
      lambda x: jax.lax.with_sharding_constraint(
          x, rows_spec(x.shape[0], x.ndim, mesh)), tree)


def replicate_axis(x: jax.Array, axis: int = -1) -> jax.Array:
  """Inside jit: the array with an axis whole on every device.

  The other axes lie as they do. States between layers are kept so: left to
  itself XLA cuts their width as the table of embeddings is cut, and then
  gathers and scatters it around every product. Logits are kept so where they
  are sampled from, or each step of a search over codes would be a collective.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x
  # Under vmap, jax forgets a constraint on any axis but the last one.
  last = jax.numpy.moveaxis(x, axis, -1)
  as_it_is = PartitionSpec.UNCONSTRAINED
  last = jax.lax.with_sharding_constraint(
      last, PartitionSpec(*(as_it_is,) * (x.ndim - 1), None))
  return jax.numpy.moveaxis(last, -1, axis)


def shard_rows(tree: Any, mesh: Mesh | None = None) -> Any:
  """Arrays that lead with rows, the same on every host, cut by rows."""
  mesh = mesh or current()
  if mesh is None:
    return tree
  return jax.tree.map(
      lambda x: _spread(x, NamedSharding(
          mesh, rows_spec(len(x), np.ndim(x), mesh))), tree)


def host_share(mesh: Mesh | None = None) -> tuple[int, int]:
  """(index, count): which part of the rows this host's devices hold.

  Raises:
    UserError: when hosts' parts overlap without being equal.
  """
  mesh = mesh or current()
  if mesh is None or jax.process_count() == 1:
    return jax.process_index(), jax.process_count()
  held: dict[int, set[int]] = {}
  for at, device in np.ndenumerate(mesh.devices):
    row = at[0] * mesh.shape["fsdp"] + at[1]
    held.setdefault(device.process_index, set()).add(row)
  parts = sorted({tuple(sorted(rows)) for rows in held.values()})
  if sum(map(len, parts)) != num_row_shards(mesh):
    raise UserError(
        "Expected tensor to divide the devices of a host or be a multiple of "
        f"them, got mesh {dict(mesh.shape)} whose hosts hold overlapping "
        "rows. Change its sizes.")
  return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def global_rows(tree: Any, rows: int, mesh: Mesh | None = None) -> Any:
  """A batch over all hosts, of this host's share.

  Args:
    tree: Arrays that lead with `rows` rows, or with that many per stream.
    rows: Of this host.
    mesh: That is set by default.

  Raises:
    UserError: when the mesh cannot share the rows evenly.
  """
  mesh = mesh or current()
  if mesh is None:
    return tree
  total, parts = rows * host_share(mesh)[1], num_row_shards(mesh)
  if total % parts:
    raise UserError(
        f"Expected a multiple, got a batch of {total} rows for data x fsdp = "
        f"{parts}. Change loop.batch, loop.accumulate or the mesh.")

  def join(x):
    x = np.asarray(x)
    x = x.reshape(-1, rows, *x.shape[1:])  # streams are joined one by one
    sharding = NamedSharding(mesh, rows_spec(total, x.ndim, mesh, 1))
    shape = (x.shape[0], total, *x.shape[2:])
    joined = jax.make_array_from_process_local_data(sharding, x, shape)
    return joined.reshape(-1, *shape[2:])

  return jax.tree.map(join, tree)


def broadcast_from_host0(values: Any) -> Any:
  """The first host's numpy array, on every host."""
  if jax.process_count() == 1:
    return values
  return np.asarray(multihost_utils.broadcast_one_to_all(values))


def barrier(what: str) -> None:
  """Returns once every host has come here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


def fetch(tree: Any) -> Any:
  """The tree as numpy arrays, whole on every host."""

  def get(x):
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
      return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))

  return jax.tree.map(get, tree)
