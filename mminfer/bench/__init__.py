"""Measuring settings on any model: how far answers move, how long they take, what they hold. Behind `mminfer bench`."""
