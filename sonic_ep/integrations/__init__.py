"""sonic_ep inside other libraries: one module for each, which imports it. Nothing else of this package does."""
