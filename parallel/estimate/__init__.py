"""What a layout costs on a described cluster: hardware, operations, the step, memory, the run, and the search."""
