"""How student, teacher and labels agree, before a run trusts a teacher."""
