"""``oserve status``: the state of a running server."""

import time
from typing import Any

from rich.console import Console
from rich.table import Table

from oserve.cli.ladder_status import show_ladder
from oserve.cli.node import node_table
from oserve.cli.options import ApiKeyOption, JsonOption, UrlOption, url_from
from oserve.cli.remote import call, decode
from oserve.switch.preview import between_nodes_line


def status(
    url: UrlOption = None,
    as_json: JsonOption = False,
    api_key: ApiKeyOption = None,
) -> None:
    """Show replicas, shapes, phases, load and routing shares of a running server."""
    url = url_from(url)
    raw = call(url, "/oserve/v1/status", api_key=api_key)
    document = decode(raw, url, needed="replicas")
    if as_json:
        print(raw.decode())
        return
    _show(document)


def _show(document: dict[str, Any]) -> None:
    console = Console(highlight=False)
    serving = "[green]serving[/]" if document["serving"] else "[red]not serving[/]"
    console.print(f"{document['model']}: {serving}, plan [bold]{document['plan_id']}[/]")
    if "controller_away_s" in document:
        away_s = document["controller_away_s"]
        console.print(
            f"[red]the controller has been down[/] for {away_s:.0f} s; this is its last state"
        )
    table = Table("replica", "shape", "devices", "phase", "running", "waiting", "KV", "note")
    for entry in document["replicas"]:
        shape = entry["shape"]
        sizes = f"TP{shape['tensor_parallel_size']} PP{shape['pipeline_parallel_size']}"
        table.add_row(
            entry["id"],
            f"{sizes} {shape['precision']} chunk {shape['max_num_batched_tokens']}",
            ", ".join(entry["devices"]) or entry.get("url") or "attached",
            f"{entry['phase']} {entry['phase_s']:.0f} s",
            str(entry["running"]),
            str(entry["waiting"]),
            f"{entry['kv_cache_usage']:.0%}",
            entry["note"] or entry["detail"],
        )
    console.print(table)
    if len(document.get("nodes", ())) > 1:
        console.print(node_table(document["nodes"]))
    if any(one["node"] for one in document.get("gateways", ())):
        console.print(_gateway_table(document["gateways"]))
    names = [entry["id"] for entry in document["replicas"]]
    shares = Table("type", "prompt tokens", *names)
    for kind in document["workload_types"]:
        bound = kind["max_prompt_tokens"]
        given = document["routing_shares"].get(kind["name"], {})
        shares.add_row(
            kind["name"],
            f"up to {bound}" if bound else "any",
            *(f"{given.get(name, 0.0):.0%}" for name in names),
        )
    console.print(shares)
    _show_energy(console, document.get("energy"))
    _show_switch(console, document.get("switch"))
    _show_control(console, document.get("control", {}))
    _show_tuning(console, document.get("tuning", {}))


def _gateway_table(gateways: list[dict[str, Any]]) -> Table:
    """Gateway processes by node."""
    table = Table("gateway of", "port", "state", "running", "waiting", "last report", "note")
    for one in gateways:
        age_s = one["report_age_s"]
        table.add_row(
            one["node"] or "(server)",
            str(one["port"] or ""),
            one["state"],
            str(one["inflight"]),
            str(one["queued"]),
            "" if age_s is None else f"{age_s:.1f} s ago",
            one["reason"],
        )
    return table


def _show_energy(console: Console, energy: dict[str, Any] | None) -> None:
    """Show the present power, and joules per output token over the last minutes."""
    if energy is None:
        return
    words = f"energy: {energy['power_w']:,.0f} W"
    if energy["idle_power_w"]:
        words += f", idle devices {energy['idle_power_w']:,.0f} W"
    ratio = energy["joules_per_output_token"]
    if ratio is not None:
        words += f", {ratio:.3g} J per output token"
    console.print(f"{words} (by {' and '.join(energy['sources'])})", soft_wrap=True)


def _show_switch(console: Console, switch: dict[str, Any] | None) -> None:
    """Show the state of the last switch."""
    if switch is None:
        return
    words = f"switch {switch['id']} to plan {switch['plan_id']} by {switch['method']}: "
    words += switch["state"]
    if switch["state"] == "running":
        words += f", wave {switch['wave'] + 1} of {switch['waves']}, {switch['phase']}"
        if switch["total_bytes"]:
            words += f", {switch['moved_bytes'] / switch['total_bytes']:.0%} of the bytes"
    if between := between_nodes_line(switch.get("programme") or {}):
        words += f"; {between}"
    if switch["reason"]:
        words += f" ({switch['reason']})"
    console.print(words, markup=False, soft_wrap=True)


def _show_tuning(console: Console, tuning: dict[str, Any]) -> None:
    """Show the constants in force that tuning changed, and its last event."""
    mode = tuning.get("mode", "off")
    if mode == "off":
        return
    changed = [f"{name} {tuning['constants'][name]}" for name in tuning["changed"]]
    words = ", ".join(changed) or "the constants of the settings"
    trial = ", on trial" if tuning["on_trial"] else ""
    console.print(f"tuning: {mode}, in force: {words}{trial}", markup=False, soft_wrap=True)
    if tuning["line"]:
        at = time.strftime("%H:%M:%S", time.localtime(tuning["line_s"]))
        console.print(f"{at} {tuning['line']}", markup=False, soft_wrap=True)


def _show_control(console: Console, control: dict[str, Any]) -> None:
    """Show the controller's forecast and its last decisions."""
    console.print(f"controller: {control.get('mode', 'off')}")
    for item in control.get("speeds", {}).get("seen", ()):
        console.print(f"speed: {item['shape']} {item['speed']:.2f} x the profile", markup=False)
    if not control.get("forecast"):
        return
    table = Table("type", "now/s", "expected/s", "90 % between")
    for item in control["forecast"]:
        table.add_row(
            item["name"],
            f"{item['now_rps']:.2f}",
            f"{item['expected_rps']:.2f}",
            f"{item['low_rps']:.2f} and {item['high_rps']:.2f}",
        )
    console.print(table)
    show_ladder(console, control)
    for decision in control["decisions"][-5:]:
        at = time.strftime("%H:%M:%S", time.localtime(decision["at_s"]))
        console.print(f"{at} {decision['line']}", markup=False, soft_wrap=True)
