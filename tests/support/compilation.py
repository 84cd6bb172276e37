"""Settings by which tests compile: quick ones, which is most of the time of small models' tests, and those of users."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import pytest
from jax._src import compiler

# Code generators side by side cost more than they save on small programs.
_QUICK = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
# What XLA does where nobody says anything.
_USERS = {"xla_cpu_use_fusion_emitters": True, "xla_cpu_parallel_codegen_split_count": 32}
_FLAGS, NO_OPTIMIZATIONS = "XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS"


def compile_quickly() -> None:
    """Sets this process, before its first program, and those that it starts to compile without most optimizations."""
    flags = (f"--{name}={str(value).lower()}" for name, value in _QUICK.items())
    os.environ[_FLAGS] = " ".join((os.environ.get(_FLAGS, ""), *flags)).strip()
    os.environ[NO_OPTIMIZATIONS] = "1"
    jax.config.update("jax_disable_most_optimizations", True)


@contextmanager
def compiling_as_users() -> Iterator[None]:
    """Compiles as users do meanwhile, here and in processes that are started; programs from before are forgotten."""
    options = compiler.get_compile_options

    def users_options(*args: Any, env_options_overrides: dict[str, Any] | None = None, **named: Any) -> Any:
        return options(*args, env_options_overrides=_USERS | (env_options_overrides or {}), **named)

    kept = [word for word in os.environ[_FLAGS].split() if word[2:].partition("=")[0] not in _QUICK]
    with pytest.MonkeyPatch.context() as patch:
        # XLA reads its flags once.
        patch.setattr(compiler, "get_compile_options", users_options)
        patch.setenv(_FLAGS, " ".join(kept))
        patch.delenv(NO_OPTIMIZATIONS)
        jax.config.update("jax_disable_most_optimizations", False)
        jax.clear_caches()
        try:
            yield
        finally:
            jax.config.update("jax_disable_most_optimizations", True)
