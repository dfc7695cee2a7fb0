"""Columns that a target trains on, measured beforehand with the run's own model and rows."""
