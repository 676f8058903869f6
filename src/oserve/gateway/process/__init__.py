"""Gateway processes and the hub through which the server reaches them."""
