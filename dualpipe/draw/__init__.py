"""Pictures of a simulation: terminal, SVG, an interactive page, and a trace for Perfetto. All read ``boxes``."""
