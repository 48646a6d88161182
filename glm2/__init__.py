"""ChatGLM2-6B (`--mode glm2`)."""
