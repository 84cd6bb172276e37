"""Choice of an operation's implementation: by platform and shape, or as asked for."""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar

import jax

# What runs on a platform, the best first; whatever is not named here has to be asked for.
PREFERRED = {"tpu": ("tpu", "xla"), "gpu": ("gpu", "xla"), "cpu": ("xla",)}
# Platforms that an implementation runs on; XLA and interpreted kernels run on all.
PLATFORMS = {"tpu": "tpu", "gpu": "gpu"}

_log = logging.getLogger("pallas_kernels")
_noted: set[str] = set()
_target: ContextVar[str | None] = ContextVar("target", default=None)
_wanted: ContextVar[tuple[str, ...] | None] = ContextVar("wanted", default=None)


class UnsupportedError(ValueError):
    """An implementation was asked for that cannot run; the message says why, in one line."""


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Chooses implementations for another platform than this machine's, to compile for it ahead of time.

    Args:
        platform: `tpu`, `gpu` or `cpu`.
    """
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)


@contextlib.contextmanager
def preferring(*names: str) -> Iterator[None]:
    """Prefers implementations where a call asks for none; what none of them can do falls back to XLA.

    Programs that have been compiled before keep what they were compiled with.

    Args:
        names: of implementations, the best first.
    """
    token = _wanted.set((*names, "xla"))
    try:
        yield
    finally:
        _wanted.reset(token)


def target_platform() -> str:
    """The platform to compile for: that of `compiling_for`, or of this process."""
    return _target.get() or jax.default_backend()


def targets_single_cpu() -> bool:
    """True where programs are compiled for one CPU: without a mesh, or along one of one device, as in training."""
    return target_platform() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1


def choose_implementation(
    operation: str,
    asked: str | Sequence[str] | None,
    obstacles: Mapping[str, str | None],
    platform: str | None = None,
    default: Sequence[str] | None = None,
) -> str:
    """The name of the implementation to run.

    Args:
        operation: its name, for messages.
        asked: an implementation, several in order of preference, or None for what suits the platform.
        obstacles: for every implementation why it cannot take these inputs, None where it can.
        platform: None for that of `compiling_for`, or of this process.
        default: preferences of the platform, where they are not those of PREFERRED.

    Raises:
        UnsupportedError: none of those that were asked for can run.
    """
    platform = platform or target_platform()
    if asked is None:
        asked = _wanted.get() or default or PREFERRED.get(platform, ("xla",))
    names = (asked,) if isinstance(asked, str) else tuple(asked)
    reasons = {}
    for name in names:
        if name not in obstacles:
            reasons[name] = "there is no such implementation"
        elif PLATFORMS.get(name, platform) != platform:
            reasons[name] = f"it runs on {PLATFORMS[name]}, this is {platform}"
        elif obstacles[name] is not None:
            reasons[name] = str(obstacles[name])
        else:
            if reasons:
                _note(f"{operation}: '{name}' instead of {_told(reasons)}")
            return name
    raise UnsupportedError(f"{operation} cannot run as {_told(reasons)}; choose among {', '.join(obstacles)}, or None")


def _told(reasons: Mapping[str, str]) -> str:
    return ", ".join(f"'{name}' ({reason})" for name, reason in reasons.items())


def _note(message: str) -> None:
    """Logs a message once."""
    if message not in _noted:
        _noted.add(message)
        _log.warning(message)
