"""verl without an accelerator; used only with ``VERL_PLATFORM=cpu``."""
