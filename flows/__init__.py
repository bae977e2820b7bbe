"""One file a flow, one flow a deployment, and the `roadfuse` command."""
