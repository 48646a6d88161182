"""ChatGLM-6B (`--mode glm`)."""
