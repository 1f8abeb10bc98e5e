"""The application: command line, configuration, the three tasks, cost estimates."""
