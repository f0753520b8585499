"""The VECTOR unit: fused fp32 lanes, function tables and row reductions."""
