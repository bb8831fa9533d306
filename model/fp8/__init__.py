"""DeepSeek-V3's fine-grained FP8 scheme (report, 3.3): formats, tiles with scales, products, and the layers that use
them. ``docs/fp8.md`` is the tour."""
