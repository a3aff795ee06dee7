"""The server of images: its API, its page and the loop behind them."""
