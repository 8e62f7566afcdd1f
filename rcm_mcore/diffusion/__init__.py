"""TrigFlow, its times, and the samplers of student and teacher."""
