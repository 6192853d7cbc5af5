"""What every editor shares: the protocol, the registry, specifications such as ``"rome+sadr"``, and how settings are settled."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from editors.prefixes import PrefixCache, Prefixes
from editors.presets import Preset, find_preset
from editors.values import Penalty, Progress, ValueConfig
from lab.errors import ConfigError
from lab.handle import ModelHandle
from lab.memory import MemoryPatch
from lab.patch import WeightPatch
from lab.records import EditRequest
from lab.registry import Registry
from lab.stats import Corpus, KeyStats, StatsCache

if TYPE_CHECKING:
    from editors.trained import Train

ConfigT = TypeVar("ConfigT")


class Editor(Protocol):
    """Turns requests into a patch. The model is bit-identical after ``edit``, also when it raises."""

    def edit(
        self,
        handle: ModelHandle,
        requests: Sequence[EditRequest],
        *,
        history: Sequence[WeightPatch] | None = None,
        progress: Progress | None = None,
    ) -> WeightPatch | MemoryPatch:
        """Computes a patch; the caller applies it.

        Args:
            handle: The model, with whatever is applied to it; those patches become the new one's parents.
            requests: What the model should say.
            history: Earlier patches whose edits must survive; only methods that protect past keys look at it.
            progress: Called with a phase, how much of it is done, and how much there is.

        Raises:
            RequestError: A request, or the list as a whole, cannot be carried out.
            NumericalError: NaN or a singular system on the way.
        """
        ...


@runtime_checkable
class ManyEditor(Protocol):
    """An editor that computes independent edits together faster than one by one."""

    def edit_many(
        self, handle: ModelHandle, requests: Sequence[EditRequest], *, progress: Progress | None = None
    ) -> Sequence[WeightPatch | MemoryPatch]:
        """One patch per request, each as if it were alone; equal to single calls up to rounding."""
        ...


def edit_many(
    editor: Editor, handle: ModelHandle, requests: Sequence[EditRequest], *, progress: Progress | None = None
) -> list[WeightPatch | MemoryPatch]:
    """Computes one patch per request, none of which sees another: what a table of single edits needs.

    Editors that can search their values together do; others take one request at a time.

    Args:
        editor: Any editor.
        handle: The model; left as it was.
        requests: Any; as no edit sees another, they may even repeat.
        progress: As in ``Editor.edit``.
    """
    if isinstance(editor, ManyEditor):
        return list(editor.edit_many(handle, requests, progress=progress))
    patches: list[WeightPatch | MemoryPatch] = []
    for request in requests:
        patches.append(editor.edit(handle, [request]))
        if progress is not None:
            progress("edits", len(patches), len(requests))
    return patches


@dataclass(frozen=True)
class EditorOptions:
    """How to run a method; what it computes with is in its config.

    Attributes:
        spec: The specification asked for (``"rome+sadr"``).
        penalties: Terms added to the value search, by name (``"sadr"``).
        preset: A row of ``presets.toml`` by name, or a file; chosen by the model's shape without it.
        stats: Key statistics on disk.
        corpus: Text behind the key statistics: ``"auto"``, ``"atlas"``, a file, ``"hub:..."``, or a ``Corpus``.
        prefixes: Fixed context templates, or a cache of generated ones.
        seed: Seeds the generated prefixes.
        overrides: Settings that differ from the preset.
    """

    spec: str
    penalties: tuple[str, ...] = ()
    preset: str | None = None
    stats: StatsCache = field(default_factory=StatsCache, repr=False)
    corpus: str | Corpus = "auto"
    prefixes: PrefixCache | Prefixes = field(default_factory=PrefixCache, repr=False)
    seed: int = 0
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """One row of the registry.

    Attributes:
        name: As in specifications.
        title: One line for lists.
        paper: Where it is described.
        cost: What an edit costs, in words.
        takes_penalties: Whether ``+sadr`` may follow.
        build: Makes the editor.
        train: Makes the network that the editor needs (its setting ``network``); ``None`` where it needs none.
        section: Of the preset table; the name without it.
    """

    name: str
    title: str
    paper: str
    cost: str
    takes_penalties: bool
    build: Callable[[EditorOptions], Editor]
    train: Train | None = None
    section: str = ""


EDITORS: Registry[Method] = Registry(
    "editor",
    {
        "rome": "editors.rome:ROME",
        "rome_identity": "editors.rome:ROME_IDENTITY",
        "r_rome": "editors.rome:R_ROME",
        "memit": "editors.memit:MEMIT",
        "pmet": "editors.pmet:PMET",
        "emmet": "editors.emmet:EMMET",
        "alphaedit": "editors.alphaedit:ALPHAEDIT",
        "ultraedit": "editors.ultraedit:ULTRAEDIT",
        "ft_l": "editors.finetune:FT_L",
        "ft_l_inf": "editors.finetune:FT_L_INF",
        "ft_m": "editors.finetune:FT_M",
        "lora": "editors.lora:LORA",
        "mend": "editors.mend:MEND",
        "serac": "editors.serac:SERAC",
        "grace": "editors.grace:GRACE",
        "wise": "editors.wise:WISE",
        "ike": "editors.in_context:IKE",
        "ice": "editors.in_context:ICE",
    },
    group="knowlab.editors",
)

PENALTIES: Registry[type[Penalty]] = Registry(
    "penalty", {"sadr": "editors.sadr:AttentionDrift"}, group="knowlab.penalties"
)


def get_editor(
    spec: str,
    *,
    preset: str | None = None,
    stats: StatsCache | None = None,
    corpus: str | Corpus = "auto",
    seed: int = 0,
    prefixes: Sequence[str] | PrefixCache | None = None,
    **overrides: Any,
) -> Editor:
    """Makes an editor from its specification.

    Args:
        spec: A method, with penalties behind it: ``"rome"``, ``"rome+sadr"``, ``"memit+sadr"``.
        preset: A row of ``presets.toml`` by name, or a file with one row; without it the model's type and shape choose.
        stats: Where key statistics are kept; the user's cache folder without it.
        corpus: Text behind the key statistics.
        seed: Seeds the generated prefixes.
        prefixes: Fixed context templates instead of generated ones, or a cache shared between editors.
        **overrides: Single settings: of the method (``layers=(3,)``, ``steps=40``, ``lr=0.3``, ``fact_token="last"``) and
            of its penalties (``gamma=0.1``).

    Raises:
        UnknownNameError: No such method or penalty; names its neighbours.
        ConfigError: The method takes no penalty, or a setting does not exist.

    Example:
        >>> patch = get_editor("rome+sadr", gamma=0.1).edit(handle, [request])
    """
    name, *penalties = spec.split("+")
    method = EDITORS.get(name)
    for penalty in penalties:
        PENALTIES.get(penalty)
    if penalties and not method.takes_penalties:
        raise ConfigError(f"{name!r} searches no value, so it cannot carry {'+'.join(penalties)!r}")
    fixed = (
        prefixes if isinstance(prefixes, PrefixCache) else None if prefixes is None else Prefixes.of(prefixes)
    )
    return method.build(
        EditorOptions(
            spec=spec,
            penalties=tuple(penalties),
            preset=preset,
            stats=stats or StatsCache(),
            corpus=corpus,
            prefixes=fixed or PrefixCache(),
            seed=seed,
            overrides=overrides,
        )
    )


@dataclass(frozen=True)
class Plan:
    """Everything that is settled once the model is known.

    Attributes:
        values: Parameters of the value search.
        penalties: Its further terms.
        preset: Where defaults came from.
        prefixes: Context templates.
        config: All settings as plain values, for the provenance.
    """

    values: ValueConfig
    penalties: tuple[Penalty, ...]
    preset: Preset
    prefixes: Prefixes
    config: Mapping[str, Any]


def settle(
    handle: ModelHandle,
    options: EditorOptions,
    section: str,
    config: type[ConfigT],
    lengths: Sequence[tuple[int, int]],
    *,
    search: bool = True,
) -> tuple[ConfigT, Plan]:
    """Combines preset, penalties' settings and overrides for one model.

    Args:
        handle: The model.
        options: How to run.
        section: The method's section of the preset table.
        config: The method's own settings, a dataclass; what it shares with ``ValueConfig`` goes there.
        lengths: Default lengths of generated prefixes.
        search: The method searches values; without it the settings of ``ValueConfig`` and the prefixes do not exist.

    Raises:
        ConfigError: A setting does not exist or makes no sense.
    """
    preset = find_preset(handle, section, options.preset)
    kinds = [PENALTIES.get(name) for name in options.penalties]
    names = {kind: _fields(kind) for kind in (config, ValueConfig, *kinds)}
    if not search:
        names[ValueConfig] = set()
    known = {"prefix_lengths"} if search else set()
    if isinstance(options.prefixes, Prefixes) and not search:
        raise ConfigError(f"{options.spec!r} reads the plain prompt only; leave prefixes out")
    check_names(options.spec, options.overrides, known.union(*names.values()))
    sadr = preset.penalty if "sadr" in options.penalties else {}
    chosen: dict[str, Any] = {
        **preset.values,
        **({"steps": sadr["steps"]} if "steps" in sadr else {}),
        **options.overrides,
    }
    if unknown := sorted(set(preset.values) - names[config] - names[ValueConfig]):
        raise ConfigError(f"preset {preset.name!r} holds {unknown[0]!r}, which {section!r} does not have")
    # Lists come from TOML and command lines; configs are compared and hashed.
    chosen = {name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()}
    values = ValueConfig(**{name: value for name, value in chosen.items() if name in names[ValueConfig]})
    own = config(**{name: value for name, value in chosen.items() if name in names[config]})
    pool = {**sadr, **options.overrides}
    penalties = tuple(
        kind(**{name: value for name, value in pool.items() if name in names[kind]}) for kind in kinds
    )
    spread = tuple(
        (int(tokens), int(number)) for tokens, number in options.overrides.get("prefix_lengths", lengths)
    )
    fixed = options.prefixes
    prefixes = fixed if isinstance(fixed, Prefixes) else fixed.get(handle, spread, options.seed)
    settings = {**(_asdict(values) if search else {}), **_asdict(own)}
    settings |= {name: _asdict(term) for name, term in zip(options.penalties, penalties, strict=True)}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    return own, Plan(values, penalties, preset, prefixes, plain)


def key_stats(
    handle: ModelHandle, options: EditorOptions, layers: Sequence[int], progress: Progress | None
) -> dict[int, KeyStats]:
    """Key statistics of ``layers``, from the cache or collected now."""

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress("key statistics", done, total)

    return options.stats.get(handle, layers, options.corpus, progress=tell)


def check_names(spec: str, settings: Iterable[str], known: Collection[str]) -> None:
    """Raises ``ConfigError`` for the first setting that ``spec`` does not know; names its neighbours."""
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(known))}"
            raise ConfigError(f"{spec!r} has no setting {name!r}; {hint}")


def check_layers(handle: ModelHandle, layers: Sequence[int]) -> None:
    """Raises ``ConfigError`` unless ``layers`` are different existing layers in ascending order."""
    if not layers or list(layers) != sorted(set(layers)):
        raise ConfigError(f"layers must be a non-empty ascending list without repeats, not {list(layers)}")
    if layers[0] < 0 or layers[-1] >= handle.n_layers:
        raise ConfigError(
            f"layers {list(layers)} do not all exist; {handle.name!r} has 0 to {handle.n_layers - 1}"
        )


def _asdict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def _fields(kind: Any) -> set[str]:
    return {each.name for each in dataclasses.fields(kind)}
