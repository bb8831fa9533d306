"""DeepSeek-V3's fine-grained FP8 scheme (report, 3.3): formats, tiles with scales, products, and the layers that use
them. ``docs/fp8.md`` is the tour."""

SIZE = 128
"""Length of a tile; products are promoted to FP32 after as many elements of K."""
