"""Self-supervised pretraining: how views are made, and the methods that learn from them."""
