package cli

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	strongroomv1 "strongroom/api/strongroom/v1"
)

// lineEvery is how often plain progress repeats itself, where there are no
// bars: often enough to show life in a log, rarely enough not to fill it.
const lineEvery = 10 * time.Second

// progress shows how far operations on several objects are: bars at a
// terminal, lines elsewhere, nothing with --quiet. Its methods may be called
// concurrently.
type progress struct {
	env   *Env
	bars  *mpb.Progress // nil without bars
	mu    sync.Mutex    // guards items, and Stderr while there are no bars
	items map[string]*item
}

// item is one object's progress.
type item struct {
	bar     *mpb.Bar // nil until its bytes are known
	step    string
	total   int64
	label   atomic.Pointer[string] // what the bar shows; mpb's goroutine reads it
	printed time.Time
}

func newProgress(env *Env) *progress {
	p := &progress{env: env, items: make(map[string]*item)}
	if env.Interactive && !env.flags.quiet {
		p.bars = mpb.New(mpb.WithOutput(env.Stderr), mpb.WithWidth(64), mpb.WithAutoRefresh())
	}
	return p
}

// task shows a state of a task whose progress counts bytes.
func (p *progress) task(t *strongroomv1.Task) {
	if t.GetUnit() == "bytes" {
		step := t.GetStep()
		if left := remaining(t); left != "" {
			step += ", " + left + " left"
		}
		p.show(t.GetTarget(), t.GetStep(), step, t.GetDone(), t.GetTotal())
	}
}

// bytes shows that done of total bytes of a step are done.
func (p *progress) bytes(name, step string, done, total int64) {
	p.show(name, step, step, done, total)
}

// show shows a step, as text, of which done of total bytes are done.
func (p *progress) show(name, step, text string, done, total int64) {
	if p.env.flags.quiet || total <= 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	it := p.items[name]
	if it == nil {
		it = new(item)
		p.items[name] = it
	}
	if p.bars != nil {
		p.draw(it, name, text, done, total)
		return
	}
	now := p.env.Now()
	if step == it.step && now.Sub(it.printed) < lineEvery {
		return
	}
	it.step, it.printed = step, now
	fmt.Fprintf(p.env.Stderr, "%s: %s: %d%% of %s\n", printable(name), printable(text), done*100/total, formatSize(total))
}

func (p *progress) draw(it *item, name, step string, done, total int64) {
	it.total = total
	label := printable(name + ": " + step)
	it.label.Store(&label)
	if it.bar == nil {
		// No lock in the decorator: mpb draws while it makes callers wait.
		// Of a bar with a total from the start, mpb allows no other.
		it.bar = p.bars.AddBar(0,
			mpb.PrependDecorators(decor.Any(func(decor.Statistics) string { return *it.label.Load() }, decor.WCSyncSpaceR)),
			mpb.AppendDecorators(decor.Percentage(decor.WCSyncSpace), decor.CountersKibiByte(" % .1f / % .1f")))
	}
	it.bar.SetTotal(total, false)
	it.bar.SetCurrent(done)
}

// end completes an object's bar, or takes it away if the operation failed.
func (p *progress) end(name string, failed bool) {
	p.mu.Lock()
	it := p.items[name]
	delete(p.items, name)
	p.mu.Unlock()
	if it == nil || it.bar == nil {
		return
	}
	if failed {
		it.bar.Abort(true)
		return
	}
	it.bar.SetCurrent(it.total) // the last bytes are seen or not
	it.bar.SetTotal(it.total, true)
}

// close waits until the last bar is drawn.
func (p *progress) close() {
	if p.bars == nil {
		return
	}
	p.mu.Lock()
	open := p.items
	p.items = make(map[string]*item)
	p.mu.Unlock()
	for _, it := range open {
		if it.bar != nil {
			it.bar.Abort(true)
		}
	}
	p.bars.Wait()
}
