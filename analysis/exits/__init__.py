"""Where thinking could have stopped: signals at its cuts, the rules that read them, and what each rule saves and costs."""
