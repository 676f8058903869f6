"""Config: settings, plan files, clusters and rates; the only room that reads the environment.

It parses files and command-line values into types of the rooms below, and does not use them.
"""

from oserve.config.cluster import ClusterSpec, load_cluster, load_hosts
from oserve.config.costs import load_switch_costs
from oserve.config.plan import load_plan, parse_plan, plan_yaml
from oserve.config.rates import load_rates
from oserve.config.settings import (
    API_KEYS,
    Settings,
    api_keys,
    backend_keys,
    environment_value,
    load_settings,
    parse_override,
    setting_paths,
)

__all__ = [
    "API_KEYS",
    "ClusterSpec",
    "Settings",
    "api_keys",
    "backend_keys",
    "environment_value",
    "load_cluster",
    "load_hosts",
    "load_plan",
    "load_rates",
    "load_settings",
    "load_switch_costs",
    "parse_override",
    "parse_plan",
    "plan_yaml",
    "setting_paths",
]
