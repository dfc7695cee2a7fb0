"""A teacher's answers on disk: built once, read by place, compared with the live teacher."""
