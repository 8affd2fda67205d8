"""sonic_ep inside other libraries: one module for each library. No other module of this package imports them."""
