// Who gets what of the budget, and what is left of it afterwards.

package budget

import "testing"

// TestShares: beyond its share a client is refused, but for its only request, and nobody else is; accounts last as long as
// requests do.
func TestShares(t *testing.T) {
	b := New(100<<10, 10<<10)
	one, again, other := b.Open([32]byte{1}), b.Open([32]byte{1}), b.Open([32]byte{2})
	if one != again || one == other || len(b.accounts) != 2 {
		t.Fatalf("%d accounts", len(b.accounts))
	}
	for _, c := range []struct {
		who  *Account
		n    int
		want error
	}{{one, 8 << 10, nil}, {again, 2 << 10, nil}, {one, 1, ErrShare}, {again, 1, ErrShare}, {other, 80 << 10, nil}, {other, 11 << 10, ErrFull}, {other, 10 << 10, nil}, {other, 1, ErrFull}} {
		if err := c.who.Take(c.n); err != c.want {
			t.Errorf("%d bytes of %v: %v, want %v", c.n, c.who.client[0], err, c.want)
		}
	}
	if one.used.Load() != 10<<10 || other.used.Load() != 90<<10 || b.Used() != 100<<10 {
		t.Errorf("%d and %d of %d bytes used", one.used.Load(), other.used.Load(), b.Used())
	}
	other.Give(90 << 10)
	other.Close()
	again.Close()
	if err := one.Take(80 << 10); err != nil { // alone
		t.Error(err)
	}
	one.Give(90 << 10)
	if one.Close(); len(b.accounts) != 0 || b.Used() != 0 {
		t.Errorf("%d accounts are left, %d bytes", len(b.accounts), b.Used())
	}
}

// TestPass: a buffer changes hands, within the share of whoever gets it; an account with a share of its own has that one.
func TestPass(t *testing.T) {
	b := New(100<<10, 10<<10)
	many, another := b.OpenWithin([32]byte{1}, 4<<10), b.OpenWithin([32]byte{1}, 4<<10)
	one, again := b.Open([32]byte{2}), b.Open([32]byte{2})
	var buf, small *Buffer
	if err := many.Move(&buf, 4<<10, false); err != nil {
		t.Fatal(err)
	}
	if err := another.Move(&small, 1, false); err != ErrShare {
		t.Errorf("beyond the share: %v", err)
	}
	if err := many.Pass(buf, one); err != nil || many.used.Load() != 0 || one.used.Load() != 4<<10 || b.Used() != 4<<10 {
		t.Errorf("passed: %v, %d and %d of %d bytes", err, many.used.Load(), one.used.Load(), b.Used())
	}
	if err := another.Move(&small, 4<<10, false); err != nil {
		t.Error(err)
	}
	one.Take(4 << 10)
	if err := another.Pass(small, again); err != ErrShare || another.used.Load() != 4<<10 || one.used.Load() != 8<<10 || b.Used() != 12<<10 {
		t.Errorf("beyond the share of whoever gets it: %v, %d and %d of %d bytes", err, another.used.Load(), one.used.Load(), b.Used())
	}
	one.Give(4 << 10)
	one.Put(&buf)
	another.Put(&small)
	for _, a := range []*Account{many, another, one, again} {
		a.Close()
	}
	if len(b.accounts) != 0 || b.Used() != 0 {
		t.Errorf("%d accounts are left, %d bytes", len(b.accounts), b.Used())
	}
}

// TestBuffers: a buffer keeps its bytes when it moves, is charged whole, and is refused without a loss.
func TestBuffers(t *testing.T) {
	b := New(64<<10, 0)
	a := b.Open([32]byte{1})
	var buf *Buffer
	for n, size := range map[int]int{1: 1 << 10, 1 << 10: 1 << 10, 1<<10 + 1: 2 << 10, 40000: 64 << 10} {
		if err := a.Grow(&buf, n, false); err != nil || cap(buf.B) != size || b.Used() != int64(size) {
			t.Errorf("%d bytes: %v, %d, %d used", n, err, cap(buf.B), b.Used())
		}
		a.Put(&buf)
	}
	a.Move(&buf, 30000, false)
	buf.B = append(buf.B, "as they were"...)
	if err := a.Grow(&buf, 33000, false); err != ErrFull || string(buf.Bytes()) != "as they were" || b.Used() != 32<<10 {
		t.Errorf("beyond the limit: %v, %q, %d used", err, buf.Bytes(), b.Used())
	}
	if err := a.Grow(&buf, 2<<20, true); err != nil || string(buf.Bytes()) != "as they were" || cap(buf.B) < 2<<20 {
		t.Errorf("owed: %v, %q", err, buf.Bytes())
	}
	a.Put(&buf)
	if a.Put(&buf); b.Used() != 0 || buf.Bytes() != nil {
		t.Errorf("%d used", b.Used())
	}
	a.Close()
}
