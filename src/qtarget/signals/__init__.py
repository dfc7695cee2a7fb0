"""Signals that a target trains on, measured beforehand: reference log-probs, old log-probs, critical tokens."""
