package task

// SetFault has f called before and after each write of e; its error stands for
// a store that failed before, or after, the write took effect.
func (e *Engine) SetFault(f func(after bool) error) { e.onWrite = f }
