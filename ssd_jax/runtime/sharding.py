"""The mesh and the sharding of all arrays; only this module names mesh axes.

  data    shards rows: images, and guidance streams of an image
  fsdp    shards rows and parameters, which are gathered layer by layer
  tensor  shards attention heads, hidden widths and the image vocabulary

The mesh is JAX's own, set by `jax.set_mesh(make_mesh("data=2,tensor=4"))`.
`shard_params`, `create` and `constrain` shard parameters; XLA's partitioner
derives the rest. Without a mesh, these functions do nothing. Results do not
depend on the mesh.
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

# Logical axis of a dimension -> the mesh axes that shard it.
_MESH_AXES_OF = {
    "embed": ("fsdp",),
    "width": ("fsdp", "tensor"),
    "heads": ("tensor",),
    "hidden": ("tensor",),
    "codes": ("tensor",),
    None: (),
}


def parse(text: str) -> dict[str, int]:
  """Parses the sizes of mesh axes, such as "data=2,tensor=4"; the default is 1.

  Raises:
    UserError: An axis is unknown, or a size is not a positive integer.
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
  """Makes the mesh that a text such as "data=2,tensor=4" describes.

  Args:
    text: Sizes of axes; "" shards rows over all devices.
    devices: Devices of the mesh; None is all. A single host may use only some
      of its devices; several hosts use all of theirs.

  Raises:
    UserError: There are too few devices, or some hosts would be unused.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = parse(text or f"data={len(devices)}")
  count = math.prod(sizes.values())
  hosts = {device.process_index for device in devices}
  if count > len(devices) or (len(hosts) > 1 and count != len(devices)):
    raise UserError(
        f"Expected a mesh of {'at most ' if len(hosts) == 1 else ''}the "
        f"{len(devices)} available devices, got mesh {text!r} of {count} "
        "devices. Change its sizes.")
  # Automatic axes: XLA's partitioner propagates the arrays' shardings.
  return jax.make_mesh(tuple(sizes.values()), AXES, (AxisType.Auto,) * 3,
                       devices=devices[:count])


def current() -> Mesh | None:
  """Returns the current mesh, or None."""
  mesh = jax.sharding.get_mesh()
  return None if mesh.empty else mesh


def cpu_mesh(rows: int, queries: int) -> Mesh | None:
  """Returns a mesh that shards the rows of a pass over CPU devices, or None.

  XLA runs the small matmuls of a pass mostly on one core, whereas several
  devices process their rows in parallel. There is none if a mesh is already
  set, or if each device would get so few queries (fewer than 4, measured) that
  reading the weights dominates.

  Args:
    rows: Images times guidance streams.
    queries: Queries per row and pass.
  """
  is_free = current() is None and jax.process_count() == 1
  if jax.default_backend() != "cpu" or not is_free:
    return None
  parts = max((n for n in range(2, len(jax.devices()) + 1)
               if rows % n == 0 and rows * queries >= 4 * n), default=1)
  return None if parts == 1 else make_mesh(f"data={parts}")


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
  """Returns a context in which the mesh is set; None keeps the current one."""
  return jax.set_mesh(mesh) if mesh else contextlib.nullcontext()


def replicate(tree: Any, mesh: Mesh) -> Any:
  """Replicates arrays of one CPU device over a mesh without copying them."""

  def shared(x):
    host = np.asarray(x)  # a view, which CPU devices read in place
    return jax.make_array_from_single_device_arrays(
        x.shape, NamedSharding(mesh, PartitionSpec()),
        [jax.device_put(host, device) for device in mesh.devices.flat])

  return jax.tree.map(shared, tree)


def num_row_shards(mesh: Any = None) -> int:
  """Returns how many shards rows have; works inside jit too."""
  mesh = mesh or jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else math.prod(mesh.shape[a] for a in _ROWS)


def even_batch(batch: int, streams: int) -> int:
  """Returns the smallest batch >= `batch` whose rows the mesh shards evenly."""
  parts = num_row_shards()
  step = parts // math.gcd(parts, streams)
  return -(-batch // step) * step


def num_param_shards() -> int:
  """Returns how many shards large parameters have."""
  mesh = current()
  return 1 if mesh is None else mesh.shape["fsdp"] * mesh.shape["tensor"]


def spec(path: str, shape: Sequence[int], mesh: Any) -> PartitionSpec:
  """Returns the sharding of a parameter.

  Args:
    path: Its keys, joined by "/".
    shape: Its shape.
    mesh: The mesh.

  Raises:
    UserError: A dimension cannot be sharded evenly.
  """
  weight = weight_of(path, len(shape))
  if weight is None:
    return PartitionSpec()
  each = (None,) * (len(shape) - len(weight.axes)) + weight.axes
  axes = [tuple(a for a in _MESH_AXES_OF[n] if mesh.shape[a] > 1) for n in each]
  for dim, (size, shared) in enumerate(zip(shape, axes, strict=True)):
    _check_even(f"dimension {dim} of {path}", size, shared, mesh)
  return PartitionSpec(*(shared or None for shared in axes))

def _check_even(
    what: str, size: int, axes: tuple[str, ...], mesh: Any
) -> None:
  """Raises UserError unless the axes shard a dimension of `size` evenly."""
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
  """Returns NamedShardings for a tree of parameters or a training state."""
  return jax.tree_util.tree_map_with_path(
      lambda path, x: NamedSharding(mesh, spec(path_of(path), x.shape, mesh)),
      tree)


def shard_params(tree: Any, mesh: Mesh | None = None) -> Any:
  """Shards a tree of parameters over the mesh, if one is set.

  Every host holds the whole tree and provides its devices' shards.
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
  """Returns `function(*args)`, a tree of parameters, created sharded."""
  mesh = current()
  if mesh is None:
    return function(*args)
  out_shardings = shardings(jax.eval_shape(function, *args), mesh)
  return jax.jit(function, out_shardings=out_shardings)(*args)


def constrain(tree: Any) -> Any:
  """Constrains a tree of parameters to its sharding; call inside jit."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return tree
  return jax.tree_util.tree_map_with_path(
      lambda path, x: jax.lax.with_sharding_constraint(
          x, spec(path_of(path), x.shape, mesh)), tree)


def rows_spec(count: int, ndim: int, mesh: Any, axis: int = 0) -> PartitionSpec:
  """Returns the sharding of rows over data and fsdp.

  Arrays whose rows cannot be sharded evenly are replicated.

  Args:
    count: Number of rows.
    ndim: Number of dimensions of the array.
    mesh: The mesh.
    axis: The row axis.
  """
  if count % num_row_shards(mesh):
    return PartitionSpec()
  return PartitionSpec(*(None,) * axis, _ROWS, *(None,) * (ndim - axis - 1))


def cache_spec(shape: Sequence[int], mesh: Any) -> PartitionSpec:
  """Returns the sharding of keys or values [L, S, K, X, H]: rows and heads."""
  rows, heads = rows_spec(shape[1], 5, mesh, 1), shape[2]
  shared = "tensor" if heads % mesh.shape["tensor"] == 0 else None
  own = rows[1] if len(rows) else None
  return PartitionSpec(None, own, shared, None, None)


def constrain_cache(cache: KVCache) -> KVCache:
  """Constrains the cache to be sharded by rows and heads; call inside jit."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not isinstance(cache, KVCache):
    return cache
  return jax.tree.map(
      lambda x: jax.lax.with_sharding_constraint(x, cache_spec(x.shape, mesh)),
      cache)


def constrain_rows(tree: Any) -> Any:
  """Constrains arrays to be sharded by their first axis; call inside jit."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return tree
  return jax.tree.map(
      lambda x: jax.lax.with_sharding_constraint(
          x, rows_spec(x.shape[0], x.ndim, mesh)), tree)


def replicate_axis(x: jax.Array, axis: int = -1) -> jax.Array:
  """Constrains an axis of an array to be unsharded; call inside jit.

  The other axes keep their shardings. Hidden states between layers need this:
  otherwise XLA shards their width like the embedding table, and gathers and
  scatters it around every matmul. Logits need it for sampling: otherwise each
  step of a search over the vocabulary would be a collective.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x
  # Under vmap, JAX drops constraints on all axes but the last one.
  last = jax.numpy.moveaxis(x, axis, -1)
  free = PartitionSpec.UNCONSTRAINED
  last = jax.lax.with_sharding_constraint(
      last, PartitionSpec(*(free,) * (x.ndim - 1), None))
  return jax.numpy.moveaxis(last, -1, axis)


def shard_rows(tree: Any, mesh: Mesh | None = None) -> Any:
  """Shards arrays, equal on every host, by their first axis."""
  mesh = mesh or current()
  if mesh is None:
    return tree
  return jax.tree.map(
      lambda x: _spread(x, NamedSharding(
          mesh, rows_spec(len(x), np.ndim(x), mesh))), tree)


def host_share(mesh: Mesh | None = None) -> tuple[int, int]:
  """Returns which part of the rows this host's devices hold.

  Returns:
    The index of the part, and the number of parts.

  Raises:
    UserError: The parts of two hosts overlap without being equal.
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
        "Expected the tensor axis to divide the devices of a host or be a "
        f"multiple of them, got mesh {dict(mesh.shape)}, whose hosts hold "
        "overlapping rows. Change its sizes.")
  return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def global_rows(tree: Any, rows: int, mesh: Mesh | None = None) -> Any:
  """Assembles a batch over all hosts from each host's part.

  Args:
    tree: Arrays whose first axis has `rows` rows, or that many per stream.
    rows: Number of rows of this host.
    mesh: The mesh; None is the current one.

  Raises:
    UserError: The mesh cannot shard the rows evenly.
  """
  mesh = mesh or current()
  if mesh is None:
    return tree
  total, parts = rows * host_share(mesh)[1], num_row_shards(mesh)
  if total % parts:
    raise UserError(
        f"Expected a batch that is a multiple of data x fsdp = {parts}, got a "
        f"batch of {total} rows. Change loop.batch, loop.accumulate or the "
        "mesh.")

  def join(x):
    x = np.asarray(x)
    x = x.reshape(-1, rows, *x.shape[1:])  # streams are joined one by one
    sharding = NamedSharding(mesh, rows_spec(total, x.ndim, mesh, 1))
    shape = (x.shape[0], total, *x.shape[2:])
    joined = jax.make_array_from_process_local_data(sharding, x, shape)
    return joined.reshape(-1, *shape[2:])

  return jax.tree.map(join, tree)


def broadcast_from_host0(values: Any) -> Any:
  """Returns the first host's numpy array on every host."""
  if jax.process_count() == 1:
    return values
  return np.asarray(multihost_utils.broadcast_one_to_all(values))


def barrier(what: str) -> None:
  """Waits until every host has reached this barrier.

  Args:
    what: Name of the barrier.
  """
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


def fetch(tree: Any) -> Any:
  """Returns the tree as numpy arrays, complete on every host."""

  def get(x):
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
      return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))

  return jax.tree.map(get, tree)
