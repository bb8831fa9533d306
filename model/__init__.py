"""The mathematics of a DeepSeek-V3-style model; it runs in one process and does not know that it can be parallel."""
