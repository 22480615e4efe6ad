"""Which selection to trust: arms compared on equal terms, by a plan that is fixed before the first comparison."""
