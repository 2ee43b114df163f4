"""Parts that every decoder model shares, each aware of its tensor-parallel slice. Plain objects; `forward` is called."""
