"""Put the plugin's config group on every Hydra search path, so that ``+hybrid_lora=enabled`` needs no flag."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class HybridLoraSearchPath(SearchPathPlugin):
    """Adds ``hybrid_lora_plugin/conf`` behind the application's own configuration."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="hybrid_lora", path="pkg://hybrid_lora_plugin.conf")
