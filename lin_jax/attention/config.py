"""Options of token mixers: those that a user chooses, and those that a model family fixes."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self, get_args

from lin_jax.errors import UserError
from lin_jax.json_files import LARGEST_ID, short
from pallas_kernels.augmented_attention.api import IMPLEMENTATIONS

DECAYS = ("none", "constant", "token")


@dataclass(frozen=True)
class Conventions:
    """Preparation of queries, keys and scores, as it differs between published models and no user chooses it.

    Attributes:
        unit: scale queries and keys of the local and grouped branches (and of `square`) to length one.
        unit_values: the same for the values of both branches, not of the convolution (T5).
        separate: queries and keys hold those of the local and of the grouped branch side by side (FLASH).
        inverse_group: divide local scores and the grouped branch by the group size (FLASH); where the branch is
            bidirectional, divide it by `length` instead.
        bias: place of the local branch's relative bias: on the scores, or on the weights after the score function.
        merged_norm: divide all heads' outputs together by `1e-4` plus their length, before the convolution (T5).
        softmax_scale: factor of softmax scores: `D^-1/2`, one, or the inverse length (FLASH).
        length: the length that `square`, a softmax scaled by it and FLASH's bidirectional branch divide by: the tokens
            that the query sees, or the row's, padding included, as published for FLASH, which cannot decode.
        centred: whether a bidirectional convolution sees both sides, or the past only (FLASH).
        factor: whether the grouped branch beside a local one has a learnt factor alpha (not in FLASH).
        relative: whether the model gives mixers a relative bias (T5, FLASH).
    """

    unit: bool = True
    unit_values: bool = False
    separate: bool = False
    inverse_group: bool = False
    bias: Literal["scores", "weights"] = "weights"
    merged_norm: bool = False
    softmax_scale: Literal["root", "one", "length"] = "root"
    length: Literal["position", "row"] = "position"
    centred: bool = True
    factor: bool = True
    relative: bool = False


@dataclass(frozen=True)
class AttentionConfig:
    """Name and sizes of a token mixer, the same in all layers of a model or another one in some.

    A causal model's layers may differ: `pattern` is repeated over them, `layers` replaces some by number. The entries
    of either are names, or mappings or configurations with fields of their own; a name or mapping takes its other
    fields from here. `of_layers` gives each layer's.

    Attributes:
        name: an attention of the registry, with `+local` and `+convolution` behind it for the augmentation, such as
            `performer+local+convolution`; `augmented` is short for `flash_global+local+convolution`. `+window` gives
            positive feature maps softmax over the tokens just before each query, under one normaliser with the memory.
        group_size: tokens in a group, by absolute position.
        kernel_size: odd size of the centred convolution kernel whose future half is masked away in causal models.
        local_score: score function of the local branch: relu_squared, laplace or yoso.
        initial_alpha: initial value of the learnt factor of the branch beside a local one.
        features: features of performer, rfa, exponential and clustered; None takes twice the head's size.
        rank: summaries of each group in linformer.
        hashes: hash tables of yoso.
        hash_bits: bits of each hash of yoso; a table has `2^hash_bits` rows.
        diagonal_layers: first layers that transnormer gives softmax attention inside groups.
        convolve_padding: let the convolution of an encoder read padding, as the published T5 does.
        implementation: of the kernels for the local and grouped branches and the convolution, and for windows with a
            memory: xla, tpu, gpu, or the last two interpreted; None takes what suits the platform. Refused for windows
            and decays that no kernel computes. Softmax over whole rows goes through cuDNN on a GPU unless this is xla.
        window: tokens of the sliding window of `+window`, or of softmax, the query's own among them. For `+window`,
            None is a window of groups; for softmax, all that is before it. With a window, decode states do not grow.
        window_groups: groups before the query's own in a window of groups.
        decay: of the memory: none, constant (a learnt factor per head) or token (from each token, per head).
        sinks: tokens at the beginning of a document that stay visible beside a window for ever, and never enter the
            memory (Xiao et al. 2024).
        rotary_memory: let a memory beside a window read queries and keys as rotary positions have turned them. Without,
            it reads them as they were before, and says the same however far a text has come; the window is as ever.
        pattern: attentions of the layers in turn, repeated, such as `[augmented, augmented, softmax]`.
        layers: attentions of some layers by their number, from 0, such as `{3: softmax, 7: softmax}`.
    """

    name: str = "augmented"
    group_size: int = 64
    kernel_size: int = 63
    local_score: str = "relu_squared"
    initial_alpha: float = 0.0
    features: int | None = None
    rank: int = 4
    hashes: int = 16
    hash_bits: int = 6
    diagonal_layers: int = 1
    convolve_padding: bool = False
    implementation: str | None = None
    window: int | None = None
    window_groups: int = 1
    decay: str = "none"
    sinks: int = 0
    rotary_memory: bool = True
    # Read from YAML as they stand there; afterwards tuples of configurations, and of pairs with numbers.
    pattern: Any = None
    layers: Any = None

    @classmethod
    def of(cls, attention: "str | AttentionConfig | Sequence[Any] | Mapping[str, Any]") -> "AttentionConfig":
        """The configuration of a name, a list of them (a pattern over layers) or a mapping of fields; or as it is.

        Raises:
            UserError: it is none of these.
        """
        if isinstance(attention, AttentionConfig):
            return attention
        if isinstance(attention, str):
            return cls(attention)
        if isinstance(attention, list | tuple):
            return cls(pattern=attention)
        if isinstance(attention, Mapping):
            return replace(cls(), **_checked_fields(attention, "attention"))
        raise UserError(
            f"attention is {attention!r}; give a name, such as 'augmented', or an AttentionConfig, or a list of them"
        )

    @property
    def kinds(self) -> "tuple[AttentionConfig, ...]":
        """The attentions that occur, each once: this one, or those of the pattern, or this and those by number."""
        if self.pattern is not None:
            return tuple(dict.fromkeys(self.pattern))
        if self.layers is not None:
            return tuple(dict.fromkeys([self._plain, *(each for _, each in self.layers)]))
        return (self,)

    @property
    def label(self) -> str:
        """Names of the attentions in a few words, for messages and tables."""
        if self.pattern is not None:
            return "[" + ", ".join(each.label for each in self.pattern) + "]"
        own = self.name if self.window is None else f"{self.name} of {self.window}"
        own = own if not self.sinks else f"{own} with {self.sinks} sinks"
        if self.layers is None:
            return own
        return f"{own}, with " + ", ".join(f"{each.label} in layer {number}" for number, each in self.layers)

    def of_layers(self, count: int) -> "tuple[AttentionConfig, ...]":
        """The attention of each of `count` layers.

        Raises:
            UserError: the pattern's length does not divide the number of layers, or a number is none of a layer.
        """
        if self.pattern is not None:
            if count % len(self.pattern):
                raise UserError(
                    f"attention.pattern has {len(self.pattern)} entries, which do not divide the model's {count} "
                    "layers; give a number of entries that does, or entries by number in attention.layers"
                )
            return self.pattern * (count // len(self.pattern))
        found = [self._plain] * count
        for number, each in self.layers or ():
            if number >= count:
                raise UserError(
                    f"attention.layers names layer {number}, and the model has {count}, numbered from 0; "
                    f"give numbers up to {count - 1}"
                )
            found[number] = each
        return tuple(found)

    def for_layers(self, count: int) -> "AttentionConfig":
        """The same for `count` layers in its shortest form: without entries, if all layers are alike, or a pattern.

        Raises:
            UserError: as in `of_layers`.
        """
        if self.pattern is None and self.layers is None:
            return self
        every = self.of_layers(count)
        lengths = (length for length in range(1, count + 1) if count % length == 0)
        shortest = next(length for length in lengths if every[:length] * (count // length) == every)
        return every[0] if shortest == 1 else replace(every[0], pattern=every[:shortest])

    def with_fields(self, **values: Any) -> Self:
        """The same with other values of some fields, in the entries of a mix too."""
        pattern, layers = self.pattern, self.layers
        if pattern is not None:
            pattern = tuple(replace(each, **values) for each in pattern)
        if layers is not None:
            layers = tuple((number, replace(each, **values)) for number, each in layers)
        return replace(self, **values, pattern=pattern, layers=layers)

    def __post_init__(self) -> None:
        for name in ("group_size", "rank", "hashes", "hash_bits"):
            if getattr(self, name) < 1:
                raise UserError(f"attention.{name} is {getattr(self, name)}; give a positive number")
        if self.features is not None and self.features < 2:
            raise UserError(f"attention.features is {self.features}; give at least 2")
        if self.implementation not in (None, *IMPLEMENTATIONS):
            raise UserError(
                f"attention.implementation is '{self.implementation}'; choose one of {', '.join(IMPLEMENTATIONS)}"
            )
        if self.window is not None and self.window < 1:
            raise UserError(f"attention.window is {self.window}; give at least 1, the query's own token")
        if self.window_groups < 0:
            raise UserError(f"attention.window_groups is {self.window_groups}; give zero or more")
        if self.sinks < 0:
            raise UserError(f"attention.sinks is {self.sinks}; give zero or more")
        if self.decay not in DECAYS:
            raise UserError(f"attention.decay is '{self.decay}'; choose one of {', '.join(DECAYS)}")
        if self.diagonal_layers < 0:
            raise UserError(f"attention.diagonal_layers is {self.diagonal_layers}; give zero or more")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise UserError(
                f"attention.kernel_size is {self.kernel_size}; give an odd number, so that the kernel has a centre"
            )
        if self.pattern is not None and self.layers is not None:
            raise UserError("attention.pattern and attention.layers are both given; give one of them")
        if self.pattern is not None:
            object.__setattr__(self, "pattern", self._read_pattern(self.pattern))
        if self.layers is not None:
            object.__setattr__(self, "layers", self._read_layers(self.layers))

    @property
    def _plain(self) -> "AttentionConfig":
        """This configuration without those of a mix, and without a window that is meant for them."""
        if self.pattern is None and self.layers is None:
            return self
        return replace(self, pattern=None, layers=None)._fitting()

    def _fitting(self, given: Collection[str] = (), *, taken: bool = False) -> "AttentionConfig":
        """An entry without what it takes from beside it, unless it is given, and has no use for."""
        base, *added = self.name.split("+")
        unfit: dict[str, Any] = {}
        # A window that stands beside is of the attentions with `+window`, if there are any, else of softmax.
        if "window" not in added and (taken or base != "softmax"):
            unfit |= {"window": None, "sinks": 0}
        if "window" not in added:
            unfit["rotary_memory"] = True
        if base in ("softmax", "square"):
            unfit["decay"] = "none"
        fitting = replace(self, **{field: value for field, value in unfit.items() if field not in given})
        if base == "softmax" and fitting.window is None and "sinks" not in given:
            return replace(fitting, sinks=0)
        return fitting

    def _read_pattern(self, entries: Any) -> "tuple[AttentionConfig, ...]":
        if not isinstance(entries, list | tuple) or not entries:
            raise UserError(
                f"attention.pattern is {short(entries)}; give a list such as [augmented, augmented, softmax]"
            )
        taken = any(_has_window(each) for each in entries)
        return tuple(self._entry(each, f"attention.pattern[{at}]", taken) for at, each in enumerate(entries))

    def _read_layers(self, entries: Any) -> "tuple[tuple[int, AttentionConfig], ...] | None":
        pairs = list(entries.items()) if isinstance(entries, Mapping) else entries
        if not isinstance(pairs, list | tuple) or not all(
            isinstance(each, list | tuple) and len(each) == 2 for each in pairs
        ):
            said = short(str(entries))
            raise UserError(f"attention.layers is {said}; give attentions by number, such as {{3: softmax}}")
        taken = _has_window(self.name) or any(_has_window(each) for _, each in pairs)
        found = {
            _layer_number(number): self._entry(each, f"attention.layers.{number}", taken) for number, each in pairs
        }
        if len(found) < len(pairs):
            raise UserError("attention.layers names a layer twice; give one attention for each")
        return tuple(sorted(found.items(), key=lambda pair: pair[0])) or None

    def _entry(self, entry: Any, where: str, taken: bool) -> "AttentionConfig":
        """The configuration of an entry of a mix; `taken` if the window that stands beside is another's."""
        if isinstance(entry, str):
            return replace(self, name=entry, pattern=None, layers=None)._fitting(taken=taken)
        if isinstance(entry, AttentionConfig):
            found = entry
        elif isinstance(entry, Mapping):
            fields = _checked_fields(entry, where)
            beside = replace(self, pattern=None, layers=None)
            found = replace(beside, **fields)._fitting(fields, taken=taken)
        else:
            raise UserError(f"{where} is {short(entry)}; give a name, such as softmax, or an attention's fields")
        if found.pattern is not None or found.layers is not None:
            raise UserError(f"{where} is a mix itself; give one attention there")
        return found


def _has_window(entry: Any) -> bool:
    name = entry.get("name") if isinstance(entry, Mapping) else getattr(entry, "name", entry)
    return "window" in str(name).split("+")[1:]


def _layer_number(number: Any) -> int:
    text = str(number)
    if isinstance(number, bool) or not text.isdecimal() or len(text) > 9:
        raise UserError(f"attention.layers has the key {short(number)}; give numbers of layers, from 0")
    return int(text)


def _checked_fields(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of an attention in a file, each of its type.

    Raises:
        UserError: a field is unknown, or has a value of another type, or one beyond what an index holds.
    """
    kinds = {each.name: each.type for each in fields(AttentionConfig)}
    if unknown := [name for name in given if name not in kinds]:
        raise UserError(f"{where}.{unknown[0]} is unknown; an attention has {', '.join(kinds)}")
    return {str(name): _checked(value, kinds[name], f"{where}.{name}") for name, value in given.items()}


def _checked(value: Any, kind: Any, where: str) -> Any:
    choices = get_args(kind) or (kind,)
    if Any in choices or (value is None and type(None) in choices):
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = type(value) in choices or (float in choices and is_number)
    if not fits or (is_number and not abs(value) <= LARGEST_ID):
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a name"}
        wanted = next(words[each] for each in choices if each in words)
        raise UserError(f"{where} is {short(value)}; give {wanted}")
    return value
