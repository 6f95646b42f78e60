package serve

import (
	"bytes"
	"net"
	"net/http"
	"strings"
	"sync"
)

// recordedBytes is how much is kept, at least, of what a connection sent last: the head of any test's request.
const recordedBytes = 64 << 10

// recordingListener keeps what connections sent, since net/http forgets the order and the case of headers.
type recordingListener struct{ net.Listener }

func (l recordingListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &recordingConn{TCPConn: conn.(*net.TCPConn)}, nil
}

type recordingConn struct {
	*net.TCPConn
	mu   sync.Mutex
	sent []byte
}

func (c *recordingConn) Read(p []byte) (int, error) {
	n, err := c.TCPConn.Read(p)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sent = append(c.sent, p[:n]...)
	if over := len(c.sent) - 2*recordedBytes; over > 0 {
		c.sent = append(c.sent[:0], c.sent[len(c.sent)-recordedBytes:]...)
	}
	return n, err
}

// receivedHeaders are the header lines of an HTTP/1 request as they came, or nil.
func receivedHeaders(r *http.Request) [][2]string {
	c, ok := r.Context().Value(connKey{}).(*recordingConn)
	if !ok || r.ProtoMajor != 1 {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	start := bytes.LastIndex(c.sent, []byte(r.Method+" "+r.RequestURI+" "+r.Proto+"\r\n"))
	if start < 0 {
		return nil
	}
	head, _, found := bytes.Cut(c.sent[start:], []byte("\r\n\r\n"))
	if !found {
		return nil
	}
	lines := [][2]string{}
	for _, line := range strings.Split(string(head), "\r\n")[1:] {
		name, value, _ := strings.Cut(line, ":")
		lines = append(lines, [2]string{name, strings.TrimSpace(value)})
	}
	return lines
}
