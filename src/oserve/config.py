"""Settings: one YAML file, the environment, the command line - read here and nowhere else.

Precedence: command line over ``OSERVE_*`` over the file over defaults. Unknown keys are refused,
with their path and the nearest known name. Secrets come from the environment or a file only.
"""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import msgspec
import yaml

from oserve.core import (
    AttachedBackend,
    DeploymentPlan,
    LengthClass,
    OServeError,
    ReplicaShape,
    ReplicaSpec,
    VllmBackend,
)
from oserve.engines.settings import EngineSettings
from oserve.gateway.settings import GatewaySettings

_PREFIX = "OSERVE_"
API_KEYS = "OSERVE_API_KEYS"
# Read by the CLI alone, not settings of the server.
_OTHER_VARIABLES = {API_KEYS, "OSERVE_CONFIG", "OSERVE_URL"}

Seconds = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class ClusterSettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Which devices there are. ``devices``: ``auto``, ``cpu`` or ``gpu``.

    ``cpu_slots`` cuts the CPU cores into that many devices; slots beyond the cores share them.
    """

    devices: Annotated[str, msgspec.Meta(pattern="^(auto|cpu|gpu)$")] = "auto"
    cpu_slots: Annotated[int, msgspec.Meta(ge=1, le=1024)] | None = None


class ControlSettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The control loop; see control.reconcile for what the limits mean."""

    interval_s: Annotated[float, msgspec.Meta(gt=0)] = 0.5
    backoff_s: Seconds = 1.0
    max_backoff_s: Seconds = 60.0
    max_failures: Count = 5
    drain_limit_s: Seconds = 600.0


class Settings(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Everything. ``state_dir`` holds logs and request records."""

    model: str = ""
    served_model_name: str = ""
    plan: str = ""
    state_dir: str = ".oserve"
    cluster: ClusterSettings = ClusterSettings()
    engines: EngineSettings = EngineSettings()
    gateway: GatewaySettings = GatewaySettings()
    control: ControlSettings = ControlSettings()


def load_settings(
    file: str | None,
    overrides: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
) -> Settings:
    """Compose the settings; ``overrides`` maps dotted paths (``gateway.port``) to values."""
    environment = os.environ if environment is None else environment
    merged: dict[str, Any] = {}
    if file:
        merged = _read_yaml(Path(file))
        _convert(merged, Settings, place=file)
    for path, text in _from_environment(environment).items():
        name = _PREFIX + path.replace(".", "_").upper()
        _put(merged, path, _scalar(text, path), place=name)
        _convert(merged, Settings, place=name)
    for path, value in overrides.items():
        _check_path(path, place=f"--set {path}")
        _put(merged, path, value, place=f"--set {path}")
    settings: Settings = _convert(merged, Settings, place="settings")
    return settings


def api_keys(
    settings: GatewaySettings, environment: Mapping[str, str] | None = None
) -> frozenset[str]:
    """The keys clients may use; empty means that none is asked for."""
    environment = os.environ if environment is None else environment
    keys = {key.strip() for key in environment.get(API_KEYS, "").split(",")}
    if settings.api_keys_file:
        keys |= {line.strip() for line in _read_text(Path(settings.api_keys_file)).splitlines()}
    return frozenset(keys - {""})


def backend_keys(
    plan: DeploymentPlan, environment: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The keys of attached servers, by the variable that the plan names."""
    environment = os.environ if environment is None else environment
    keys: dict[str, str] = {}
    for spec in plan.replicas:
        backend = spec.backend
        if isinstance(backend, AttachedBackend) and backend.api_key_env:
            if not environment.get(backend.api_key_env):
                raise OServeError(
                    f"replica {spec.id!r} takes its key from {backend.api_key_env}: not set",
                    place="environment",
                    remedy=f"set {backend.api_key_env}, or leave api_key_env out",
                )
            keys[backend.api_key_env] = environment[backend.api_key_env]
    return keys


def environment_value(name: str) -> str:
    """A variable the CLI reads for a default; empty when unset."""
    return os.environ.get(name, "")


# -- the plan file --------------------------------------------------------------------------------
class _AttachFile(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    url: Annotated[str, msgspec.Meta(pattern="^https?://[^/]+")]
    model: str = ""
    api_key_env: str | None = None
    priority: bool = False


class _ReplicaFile(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    id: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")]
    shape: dict[str, Any] = {}
    devices: list[str] = []
    engine_args: list[str] = []
    attach: _AttachFile | None = None


class _TypeFile(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    name: Annotated[str, msgspec.Meta(pattern=r"^[^\x00-\x1f\x7f]{1,63}$")]
    max_prompt_tokens: Count | None = None
    output_tokens: Count = 128


class _ShapeFile(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    tensor_parallel_size: Count = 1
    pipeline_parallel_size: Count = 1
    precision: str = "bf16"
    max_num_batched_tokens: Count = 2048
    max_num_seqs: Count = 128
    kv_cache_memory_bytes: Count | None = None


class _PlanFile(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    replicas: list[_ReplicaFile]
    id: str = "plan"
    workload_types: list[_TypeFile] = []
    routing_shares: dict[str, dict[str, float]] | None = None


def load_plan(file: str) -> DeploymentPlan:
    """Read a plan; what it means is checked against devices elsewhere (plan.check_plan)."""
    parsed = _convert(_read_yaml(Path(file)), _PlanFile, place=file)
    kinds = tuple(
        LengthClass(
            name=kind.name,
            max_prompt_tokens=kind.max_prompt_tokens,
            output_tokens=kind.output_tokens,
        )
        for kind in parsed.workload_types
    ) or (LengthClass(name="all"),)
    replicas = tuple(
        _replica(item, place=f"{file}: replicas[{index}]")
        for index, item in enumerate(parsed.replicas)
    )
    equal = {item.id: 1.0 / len(replicas) for item in replicas}
    shares = parsed.routing_shares
    return DeploymentPlan(
        id=parsed.id,
        replicas=replicas,
        workload_types=kinds,
        routing_shares={kind.name: dict(equal) for kind in kinds} if shares is None else shares,
    )


def _replica(item: _ReplicaFile, *, place: str) -> ReplicaSpec:
    _convert(item.shape, _ShapeFile, place=f"{place}.shape")
    shape = _convert(item.shape, ReplicaShape, place=f"{place}.shape")
    backend: VllmBackend | AttachedBackend = VllmBackend(engine_args=tuple(item.engine_args))
    if item.attach is not None:
        attach = item.attach
        backend = AttachedBackend(
            url=attach.url.rstrip("/"),
            model=attach.model,
            api_key_env=attach.api_key_env,
            priority=attach.priority,
        )
        if item.engine_args:
            raise OServeError(
                "an attached server is not started here, so it takes no engine_args",
                place=f"{place}.engine_args",
                remedy="leave engine_args out",
            )
    return ReplicaSpec(id=item.id, shape=shape, devices=tuple(item.devices), backend=backend)


# -- reading --------------------------------------------------------------------------------------
def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise OServeError(
            f"cannot read it: {reason}", place=str(path), remedy="check the path"
        ) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(_read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark is not None else str(path)
        problem = getattr(error, "problem", None) or "it is not valid YAML"
        raise OServeError(str(problem), place=where, remedy="correct the YAML") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise OServeError(
            "expected keys and values", place=str(path), remedy="see docs/configuration.md"
        )
    return loaded


def _convert(value: Any, kind: Any, *, place: str) -> Any:
    try:
        return msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$")
        path = path.rstrip("`")
        unknown = re.search(r"unknown field `([^`]*)`", text)
        if unknown is None:
            where = f"{place}: {path.lstrip('.')}" if path else place
            raise OServeError(text, place=where, remedy="correct the value") from None
        name = unknown.group(1)
        known = _fields_at(kind, path)
        close = difflib.get_close_matches(name, known, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
        where = f"{place}: {(path + '.' + name).lstrip('.')}"
        raise OServeError(f"unknown key {name!r}", place=where, remedy=remedy) from None


def _fields_at(kind: Any, path: str) -> list[str]:
    """Names allowed where ``path`` (msgspec's, such as ``.replicas[0].shape``) leads."""
    for step in re.findall(r"\.(\w+)|(\[[^\]]*\])", path):
        kind = _element(kind) if step[1] else _field_types(kind).get(step[0])
    return list(_field_types(_struct(kind)))


def _struct(kind: Any) -> Any:
    options = [kind, *get_args(kind)]
    return next((item for item in options if hasattr(item, "__struct_fields__")), kind)


def _element(kind: Any) -> Any:
    arguments = get_args(kind)
    return arguments[-1] if arguments else None


def _field_types(kind: Any) -> dict[str, Any]:
    kind = _struct(kind)
    if not hasattr(kind, "__struct_fields__"):
        return dict.fromkeys(getattr(kind, "__dataclass_fields__", {}))
    return {item.name: item.type for item in msgspec.structs.fields(kind)}


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
                remedy=_suggest(variable, list(names), "unset it"),
            )
        found[names[variable]] = value
    return found


def _check_path(path: str, *, place: str) -> None:
    if path not in setting_paths():
        raise OServeError(
            f"no setting is called {path!r}",
            place=place,
            remedy=_suggest(path, list(setting_paths()), "see docs/configuration.md"),
        )


def _suggest(name: str, known: Sequence[str], otherwise: str) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else otherwise


def _scalar(text: str, path: str) -> Any:
    """A value from the environment or ``--set``: YAML, but text stays text for text settings."""
    if setting_paths()[path].type is str:
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def parse_override(text: str) -> tuple[str, Any]:
    """``gateway.port=9000`` as path and value."""
    path, equals, value = text.partition("=")
    if not equals:
        raise OServeError(
            "expected path=value", place=f"--set {text}", remedy="for example gateway.port=9000"
        )
    _check_path(path, place=f"--set {path}")
    return path, _scalar(value, path)


def _put(settings: dict[str, Any], path: str, value: Any, *, place: str) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        inner = settings.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise OServeError(f"{parent} is not a section", place=place, remedy="correct the file")
        settings = inner
    settings[name] = value
