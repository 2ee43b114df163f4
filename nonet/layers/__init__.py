"""Parts that every decoder model shares, each aware of its tensor-parallel slice. No `nn.Module`."""
