package serve

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"

	"forkd.dev/forkd/tests/shop/internal/who"
)

// Bounds on what one request may ask for.
const (
	maxDelay = 10 * time.Minute
	maxBytes = 1 << 32
	maxParts = 1 << 20
)

// web is the HTTP face that all HTTP services share: what differs is whom they call.
type web struct {
	*Service
	requests, probes atomic.Int64
}

func startHTTP(s *Service, listen []string) error {
	l, err := s.listen(listen[0])
	if err != nil {
		return err
	}
	server := &http.Server{
		Handler:           (&web{Service: s}).handler(),
		ReadHeaderTimeout: 10 * time.Second,
		Protocols:         new(http.Protocols),
		ConnContext:       withConn,
	}
	server.Protocols.SetHTTP1(true)
	server.Protocols.SetUnencryptedHTTP2(true)
	s.onStop(func(ctx context.Context) {
		if server.Shutdown(ctx) != nil {
			server.Close()
		}
	})
	go func() {
		if err := server.Serve(recordingListener{l}); err != http.ErrServerClosed {
			s.fail(err)
		}
	}()
	return nil
}

func (s *web) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/{$}", s.tree)
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok\n") })
	mux.HandleFunc("/stats", func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, map[string]int64{"requests": s.requests.Load(), "probes": s.probes.Load()})
	})
	mux.HandleFunc("/headers", s.headers)
	mux.HandleFunc("/echo", echo)
	mux.HandleFunc("/slow", s.slow)
	mux.HandleFunc("/stream", s.stream)
	mux.HandleFunc("/bytes", sendBytes)
	mux.HandleFunc("/status/{code}", status)
	mux.HandleFunc("/ws", s.websocket)
	mux.HandleFunc("/env", env)
	return s.signed(mux)
}

// signed counts requests and says in the headers of every answer who gave it.
func (s *web) signed(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		key := carriers(r).Key()
		switch {
		case strings.HasPrefix(r.UserAgent(), "kube-probe/"):
			s.probes.Add(1)
		case r.URL.Path != "/stats":
			s.requests.Add(1)
			s.log.Info("request", "service", s.self.Service, "method", r.Method, "path", r.URL.Path, "proto", r.Proto, "key", key)
		}
		h := w.Header()
		h.Set("Shop-Service", s.self.Service)
		h.Set("Shop-Version", s.self.Version)
		h.Set("Shop-Where", s.self.Where)
		h.Set("Shop-Pod", s.self.Pod)
		h.Set("Shop-Via", r.Proto)
		h.Set("Shop-Key", key)
		next.ServeHTTP(w, r)
	})
}

func carriers(r *http.Request) who.Carriers { return who.Read(r.Header.Values) }

func (s *web) answer(r *http.Request) who.Answer { return s.self.Answer(r.Proto, carriers(r).Key()) }

func (s *web) tree(w http.ResponseWriter, r *http.Request) {
	answer := s.answer(r)
	answer.Calls = s.ask(r.Context(), carriers(r))
	if strings.Contains(r.Header.Get("Accept"), "text/html") {
		writePage(w, answer)
		return
	}
	writeJSON(w, answer)
}

// headers gives back the request's headers: over HTTP/1 as they came, over HTTP/2 by name.
func (s *web) headers(w http.ResponseWriter, r *http.Request) {
	lines := receivedHeaders(r)
	if lines == nil {
		lines = append(lines, [2]string{"host", r.Host})
		for name, values := range r.Header {
			for _, value := range values {
				lines = append(lines, [2]string{strings.ToLower(name), value})
			}
		}
		slices.SortStableFunc(lines, func(a, b [2]string) int { return strings.Compare(a[0], b[0]) })
	}
	writeJSON(w, map[string]any{"proto": r.Proto, "remote": r.RemoteAddr, "headers": lines})
}

// echo sends the body back as it arrives, then its trailers. "100 Continue" goes out with the first read.
func echo(w http.ResponseWriter, r *http.Request) {
	control := http.NewResponseController(w)
	control.EnableFullDuplex() // HTTP/2 is, and says it knows no such thing
	w.Header().Set("Content-Type", "application/octet-stream")
	buf := make([]byte, 32<<10)
	for {
		n, err := r.Body.Read(buf)
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return
			}
			control.Flush()
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			panic(http.ErrAbortHandler)
		}
	}
	control.Flush() // trailers need a body of unknown length
	for name, values := range r.Trailer {
		w.Header()[http.TrailerPrefix+name] = values
	}
}

func (s *web) slow(w http.ResponseWriter, r *http.Request) {
	if sleep(r.Context(), number(r, "ms", 1000)) {
		writeJSON(w, s.answer(r))
	}
}

// stream sends n lines, ms apart, each as soon as it is written.
func (s *web) stream(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/x-ndjson")
	control := http.NewResponseController(w)
	ms := number(r, "ms", 100)
	for i := range min(number(r, "n", 5), maxParts) {
		if i > 0 && !sleep(r.Context(), ms) {
			return
		}
		json.NewEncoder(w).Encode(map[string]any{"n": i, "service": s.self.Service, "where": s.self.Where, "pod": s.self.Pod})
		control.Flush()
	}
}

func sendBytes(w http.ResponseWriter, r *http.Request) {
	left := min(number(r, "n", 1024), maxBytes)
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Length", strconv.FormatInt(left, 10))
	block := make([]byte, 32<<10)
	for left > 0 && r.Method != http.MethodHead {
		n, err := w.Write(block[:min(left, int64(len(block)))])
		if err != nil {
			return
		}
		left -= int64(n)
	}
}

// status answers without reading the body: a client that waits for "100 Continue" gets its final answer at once.
func status(w http.ResponseWriter, r *http.Request) {
	code, err := strconv.Atoi(r.PathValue("code"))
	if err != nil || code < 200 || code > 599 {
		http.Error(w, "a status is a number from 200 to 599", http.StatusBadRequest)
		return
	}
	w.WriteHeader(code)
	if code != http.StatusNoContent && code != http.StatusNotModified {
		fmt.Fprintf(w, "%d %s\n", code, http.StatusText(code))
	}
}

// websocket says who answered, then echoes every message.
func (s *web) websocket(w http.ResponseWriter, r *http.Request) {
	conn, err := websocket.Accept(w, r, &websocket.AcceptOptions{InsecureSkipVerify: true})
	if err != nil {
		return
	}
	defer conn.CloseNow()
	conn.SetReadLimit(16 << 20)
	first, _ := json.Marshal(s.answer(r))
	if conn.Write(r.Context(), websocket.MessageText, first) != nil {
		return
	}
	for {
		kind, message, err := conn.Read(r.Context())
		if err != nil || conn.Write(r.Context(), kind, message) != nil {
			return
		}
	}
}

func env(w http.ResponseWriter, r *http.Request) {
	value, ok := os.LookupEnv(r.URL.Query().Get("name"))
	if !ok {
		http.Error(w, "not set", http.StatusNotFound)
		return
	}
	io.WriteString(w, value)
}

func writeJSON(w http.ResponseWriter, value any) {
	w.Header().Set("Content-Type", "application/json")
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "  ")
	encoder.Encode(value)
}

// number is a query parameter that is not negative.
func number(r *http.Request, name string, otherwise int64) int64 {
	n, err := strconv.ParseInt(r.URL.Query().Get(name), 10, 64)
	if err != nil || n < 0 {
		return otherwise
	}
	return n
}

// sleep waits for ms and reports whether it was let to.
func sleep(ctx context.Context, ms int64) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(min(time.Duration(ms)*time.Millisecond, maxDelay)):
		return true
	}
}

type connKey struct{}

func withConn(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, connKey{}, conn)
}
