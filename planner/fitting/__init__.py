"""Plans for models that were written elsewhere: captured, costed, solved, simulated whole, applied."""
