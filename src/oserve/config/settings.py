"""Settings from one YAML file, the environment and the command line.

The command line takes precedence over ``OSERVE_*`` variables, these over the file, the file over
defaults. An unknown key is an error with its path and the nearest known name. Secrets come only
from the environment or a file.
"""

import copy
import os
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_args

import msgspec

from oserve.config.reading import convert, parse_yaml_value, read_document, read_text, suggest
from oserve.control.decision import Mode
from oserve.core import AttachedBackend, DeploymentPlan, Objective, OServeError, Precision
from oserve.engines.settings import EngineSettings
from oserve.gateway.settings import GatewaySettings
from oserve.traces import TimeUnit

_PREFIX = "OSERVE_"
API_KEYS = "OSERVE_API_KEYS"
# The CLI reads these; they are no settings of the server.
_OTHER_VARIABLES = {API_KEYS, "OSERVE_CONFIG", "OSERVE_URL"}

Seconds = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class ClusterSettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The devices of each machine. ``devices``: ``auto``, ``cpu`` or ``gpu``.

    ``cpu_slots`` divides the CPU cores into that many devices; with more slots than cores, slots
    share cores. ``cpu_flags``: ``auto``, or CPU flags to assume, as in /proc/cpuinfo. ``nodes``:
    empty for this machine, else the machines to serve on: ``ray``, ``ray:HOST:PORT``, or a cluster
    file with ``hosts``. ``hatch_port`` and ``node_state_dir``: of the nodes of a Ray cluster; 0
    takes any free port. ``fetch``: ``auto`` has nodes that lack the model's files get them from
    nodes that have them.
    """

    nodes: str = ""
    fetch: Annotated[str, msgspec.Meta(pattern="^(auto|never)$")] = "auto"
    hatch_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    node_state_dir: Annotated[str, msgspec.Meta(min_length=1)] = "~/.oserve/nodes"

    devices: Annotated[str, msgspec.Meta(pattern="^(auto|cpu|gpu)$")] = "auto"
    cpu_slots: Annotated[int, msgspec.Meta(ge=1, le=1024)] | None = None
    cpu_flags: str = "auto"


class ControlSettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The control loop, and the controller that decides on its plan.

    See ``control.reconcile`` for the limits of restarts and ``control.policy`` for decisions.
    ``mode``: ``off``, ``advise`` or ``auto``; unset means auto for a computed plan and off for a
    given one. ``interval_s`` is the time between rounds of the loop, ``decision_interval_s``
    between decisions, ``shares_interval_s`` between new routing shares. ``start_s``: assumed start
    time of a replica until one is observed. ``simulate``: simulate deployments before a decision,
    beyond the linear model. ``fall_after_s``: a deployment for less load must hold the highest load
    of so many seconds. ``resume``: continue with the plan in force when the last server ended.
    ``tune``: search better constants of dispatch on the server's own records, at most every
    ``tune_interval_s``, and only for ``tune_min_gain`` on records that are held out.
    """

    mode: Mode | None = None
    interval_s: Annotated[float, msgspec.Meta(gt=0)] = 0.5
    decision_interval_s: Annotated[int, msgspec.Meta(ge=1, le=900)] = 60
    shares_interval_s: Annotated[float, msgspec.Meta(gt=0)] = 5.0
    min_dwell_s: Seconds = 120.0
    max_switches_per_hour: Annotated[int, msgspec.Meta(ge=0)] = 12
    min_gain: Annotated[float, msgspec.Meta(ge=0)] = 0.05
    margin: Annotated[float, msgspec.Meta(ge=0)] = 1.5
    lasts_s: Annotated[float, msgspec.Meta(gt=0)] = 900.0
    start_s: Seconds = 30.0
    fall_after_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 900.0
    shrink_after_s: Seconds = 0.0
    floor_replicas: Count = 1
    hold_s: Seconds = 1800.0
    simulate: bool = True
    resume: bool = True
    tune: Mode = Mode.OFF
    tune_interval_s: Annotated[float, msgspec.Meta(ge=60)] = 3600.0
    tune_min_gain: Annotated[float, msgspec.Meta(ge=0)] = 0.02
    backoff_s: Seconds = 1.0
    max_backoff_s: Seconds = 60.0
    max_failures: Count = 5
    drain_limit_s: Seconds = 600.0


class SwitchSettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """How the server switches between plans; see docs/switching.md.

    ``method``: ``auto`` moves weights between engines where possible and restarts engines
    otherwise; ``restart`` always restarts them. ``transfer_limit_s``: the deadline of a transfer,
    or twenty times its predicted duration if that is longer. ``bytes_per_s``: the rate at which a
    rank sends or receives; 0 for no limit. ``max_perplexity_rise``: how much the perplexity may
    rise, as a fraction, when weights are quantised during the transfer.
    """

    method: Annotated[str, msgspec.Meta(pattern="^(auto|restart)$")] = "auto"
    transfer_limit_s: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    bytes_per_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    max_perplexity_rise: Annotated[float, msgspec.Meta(ge=0)] = 0.05


class PlanningSettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What a plan is computed from if none is given; see docs/planning.md.

    The traffic is that of ``trace`` or ``rates``, else of the request records, else an assumed mix.
    ``objective``: what a deployment is chosen for, once the SLO holds; ``type_objectives`` by type.
    ``attainment``: the share of requests that must meet the SLO. ``headroom`` (a factor) and
    ``quantile`` (of the forecast): the load that a deployment must hold.
    ``time_unit``: of the timestamps in the trace; ``auto`` infers it from the file. ``profile``: a
    file of step times by ``oserve profile``. ``precisions``: what replicas may have; by default the
    plain one and all of ``engines.variants``. ``measure``: ``auto`` measures briefly before the
    first plan if nothing was measured of the model on this CPU. ``min_shapes``: plan at least this
    many different shapes, even if a homogeneous deployment is better. ``spread``: the share of the
    objective that may be paid so that the loss of one node leaves every type a replica.
    """

    trace: str = ""
    time_unit: TimeUnit = TimeUnit.AUTO
    rates: str = ""
    profile: str = ""
    slo_ttft_ms: Annotated[float, msgspec.Meta(gt=0)] | None = None
    slo_tpot_ms: Annotated[float, msgspec.Meta(gt=0)] | None = None
    objective: Objective = Objective.LATENCY
    type_objectives: dict[str, Objective] = {}
    attainment: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.95
    headroom: Annotated[float, msgspec.Meta(ge=1)] = 1.1
    quantile: Annotated[float, msgspec.Meta(ge=0.5, lt=1)] = 0.95
    precisions: tuple[Precision, ...] = ()
    measure: Annotated[str, msgspec.Meta(pattern="^(auto|never)$")] = "auto"
    min_shapes: Count = 1
    spread: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0


class Settings(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """All settings. ``state_dir``: the folder of logs, request records and the server's state."""

    model: str = ""
    served_model_name: str = ""
    plan: str = ""
    state_dir: str = ".oserve"
    cluster: ClusterSettings = ClusterSettings()
    engines: EngineSettings = EngineSettings()
    gateway: GatewaySettings = GatewaySettings()
    control: ControlSettings = ControlSettings()
    planning: PlanningSettings = PlanningSettings()
    switch: SwitchSettings = SwitchSettings()


def load_settings(
    file: str | None,
    overrides: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
    *,
    base: Mapping[str, Any] | None = None,
) -> Settings:
    """The settings; ``overrides`` maps dotted paths (``gateway.port``) to values.

    ``base`` replaces the defaults. Raises OServeError for an unknown key or an invalid value.
    """
    environment = os.environ if environment is None else environment
    merged: dict[str, Any] = copy.deepcopy(dict(base or {}))
    if file:
        merged = read_document(Path(file))
        _spell(merged)
        convert(merged, Settings, place=file)
    for path, text in _from_environment(environment).items():
        name = _PREFIX + path.replace(".", "_").upper()
        _put(merged, path, _scalar(text, path, place=name), place=name)
        convert(merged, Settings, place=name)
    for path, value in overrides.items():
        _check_path(path, place=f"--set {path}")
        _put(merged, path, value, place=f"--set {path}")
    return convert(merged, Settings, place="settings")


def api_keys(
    settings: GatewaySettings, environment: Mapping[str, str] | None = None
) -> frozenset[str]:
    """The API keys that clients may use; empty means that no key is required."""
    environment = os.environ if environment is None else environment
    keys = {key.strip() for key in environment.get(API_KEYS, "").split(",")}
    if settings.api_keys_file:
        keys |= {line.strip() for line in read_text(Path(settings.api_keys_file)).splitlines()}
    return frozenset(keys - {""})


def backend_keys(
    plan: DeploymentPlan, environment: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Values of the environment variables that a plan names for attached servers.

    Raises OServeError if one is not set.
    """
    environment = os.environ if environment is None else environment
    keys: dict[str, str] = {}
    for spec in plan.replicas:
        backend = spec.backend
        for name in backend.variables if isinstance(backend, AttachedBackend) else ():
            if not environment.get(name):
                raise OServeError(
                    f"replica {spec.id!r} takes its key from {name}: not set",
                    place="environment",
                    remedy=f"set {name}, or take it out of the plan",
                )
            keys[name] = environment[name]
    return keys


def environment_value(name: str) -> str:
    """An environment variable with a default of the CLI; empty if unset."""
    return os.environ.get(name, "")


def setting_paths(kind: Any = Settings, prefix: str = "") -> dict[str, msgspec.structs.FieldInfo]:
    """Every setting by its dotted path."""
    paths: dict[str, msgspec.structs.FieldInfo] = {}
    for item in msgspec.structs.fields(kind):
        if hasattr(item.type, "__struct_fields__"):
            paths |= setting_paths(item.type, f"{prefix}{item.name}.")
        else:
            paths[f"{prefix}{item.name}"] = item
    return paths


def _from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    names = {_PREFIX + path.replace(".", "_").upper(): path for path in setting_paths()}
    found: dict[str, str] = {}
    for variable, value in environment.items():
        if not variable.startswith(_PREFIX) or variable in _OTHER_VARIABLES:
            continue
        if variable not in names:
            raise OServeError(
                "no setting has this name",
                place=variable,
                remedy=suggest(variable, list(names), "unset it"),
            )
        found[names[variable]] = value
    return found


def _check_path(path: str, *, place: str) -> None:
    if path not in setting_paths():
        raise OServeError(
            f"no setting is called {path!r}",
            place=place,
            remedy=suggest(path, list(setting_paths()), "see docs/configuration.md"),
        )


def _scalar(text: str, path: str, *, place: str) -> Any:
    """A value from the environment or ``--set``: YAML, except for the words of a setting."""
    if setting_paths()[path].type is str or text in _words(path):
        return text
    return parse_yaml_value(text, place=place)


def _words(path: str) -> frozenset[str]:
    """The words that a setting may have, if it is an enumeration."""
    kind = setting_paths()[path].type
    parts = get_args(kind) or (kind,)
    kinds = [part for part in parts if isinstance(part, type) and issubclass(part, StrEnum)]
    return frozenset(str(word) for part in kinds for word in part)


def _spell(settings: dict[str, Any]) -> None:
    """YAML parses the word off as false; restore it where a setting has that word."""
    for path in setting_paths():
        *parents, name = path.split(".")
        inner: Any = settings
        for parent in parents:
            inner = inner.get(parent) if isinstance(inner, dict) else None
        if isinstance(inner, dict) and inner.get(name) is False and "off" in _words(path):
            inner[name] = "off"


def parse_override(text: str) -> tuple[str, Any]:
    """``gateway.port=9000`` as path and value."""
    path, equals, value = text.partition("=")
    if not equals:
        raise OServeError(
            "expected path=value", place=f"--set {text}", remedy="for example gateway.port=9000"
        )
    place = f"--set {path}"
    _check_path(path, place=place)
    return path, _scalar(value, path, place=place)


def _put(settings: dict[str, Any], path: str, value: Any, *, place: str) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        inner = settings.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise OServeError(f"{parent} is not a section", place=place, remedy="correct the file")
        settings = inner
    settings[name] = value
