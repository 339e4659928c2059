"""The atlas: how far the updates of losses lie from each other on some pairs, without training."""
