"""Put the plugin's config group on every Hydra search path, so that ``+hybrid_lora=enabled`` needs no flag."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from hybrid_lora_plugin.config import HybridLoraConfig


class HybridLoraSearchPath(SearchPathPlugin):
    """Adds ``hybrid_lora_plugin/conf`` behind the application's own configuration, and the defaults of its options."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="hybrid_lora", path="pkg://hybrid_lora_plugin.conf")
        # Plain values, as if written in YAML: a mistake is then told by the preflight, in its own words.
        defaults = OmegaConf.to_container(OmegaConf.structured(HybridLoraConfig))
        ConfigStore.instance().store(
            group="hybrid_lora_options", name="defaults", node=defaults, provider="hybrid_lora"
        )
