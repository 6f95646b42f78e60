package client

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"time"
	"unicode/utf8"

	"forkd.dev/forkd/tests/shop/internal/who"
)

// maxShown bounds how much of a body is printed.
const maxShown = 4096

func openHTTP(h2 bool) func(*options) (asker, error) {
	return func(o *options) (asker, error) {
		transport := &http.Transport{
			Protocols:             new(http.Protocols),
			ExpectContinueTimeout: o.timeout,
			DisableCompression:    true,
		}
		transport.Protocols.SetHTTP1(!h2)
		transport.Protocols.SetUnencryptedHTTP2(h2)
		return asker{
			ask: func(ctx context.Context, key string, line *Line) error {
				return askHTTP(ctx, o, transport, key, line)
			},
			close: transport.CloseIdleConnections,
		}, nil
	}
}

func askHTTP(ctx context.Context, o *options, transport *http.Transport, key string, line *Line) error {
	start := time.Now()
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn:              func(c httptrace.GotConnInfo) { line.Conn = c.Conn.LocalAddr().String() },
		Got100Continue:       func() { line.Continued = true },
		GotFirstResponseByte: func() { line.FirstMs = since(start) },
	})
	req, sent, err := newRequest(ctx, o, key)
	if err != nil {
		return err
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	line.Proto, line.Status = resp.Proto, resp.StatusCode
	line.ServedBy = resp.Header.Get("forkd-served-by")

	same := compare{want: sent}
	shown := limited{left: maxShown}
	n, err := io.Copy(io.MultiWriter(&same, &shown), resp.Body)
	line.Bytes = n
	line.Trailers = flat(resp.Trailer)
	if sent != nil {
		line.Same = same.result()
	}
	line.Answer = answerOf(resp.Header, shown.Bytes())
	if 0 < n && n <= maxShown && (line.Answer == nil || o.path != "/") {
		line.Body = show(shown.Bytes())
	}
	return err
}

// show is a body as it is printed.
func show(body []byte) json.RawMessage {
	switch {
	case json.Valid(body):
		return body
	case utf8.Valid(body):
		text, _ := json.Marshal(string(body))
		return text
	}
	return nil
}

func newRequest(ctx context.Context, o *options, key string) (*http.Request, []byte, error) {
	var sent []byte
	var body io.Reader
	method := cmp.Or(o.method, http.MethodGet)
	if o.bytes > 0 {
		sent = payload(o.bytes)
		body = bytes.NewReader(sent)
		method = cmp.Or(o.method, http.MethodPost)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://"+o.addr+o.path, body)
	if err != nil {
		return nil, nil, err
	}
	for _, header := range o.headers {
		name, value, _ := strings.Cut(header, ":")
		req.Header.Add(name, strings.TrimSpace(value))
	}
	for name, values := range who.Carry(o.carrier, key) {
		for _, value := range values {
			req.Header.Add(name, value)
		}
	}
	if host := req.Header.Get("Host"); host != "" {
		req.Host = host
	}
	if o.expect {
		req.Header.Set("Expect", "100-continue")
	}
	if len(o.trailers) > 0 {
		req.Trailer = http.Header{}
		req.ContentLength = -1
	}
	for _, trailer := range o.trailers {
		name, value, _ := strings.Cut(trailer, ":")
		req.Trailer[textproto.CanonicalMIMEHeaderKey(name)] = []string{strings.TrimSpace(value)}
	}
	return req, sent, nil
}

// answerOf reads who answered from the body, or from the headers that every answer of the shop has.
func answerOf(h http.Header, body []byte) *who.Answer {
	var answer who.Answer
	if json.Unmarshal(body, &answer) == nil && answer.Pod != "" {
		return &answer
	}
	if h.Get("Shop-Service") == "" {
		return nil
	}
	return &who.Answer{
		Service: h.Get("Shop-Service"), Version: h.Get("Shop-Version"), Where: h.Get("Shop-Where"),
		Pod: h.Get("Shop-Pod"), Via: h.Get("Shop-Via"), Key: h.Get("Shop-Key"),
	}
}

func flat(values map[string][]string) map[string]string {
	if len(values) == 0 {
		return nil
	}
	out := map[string]string{}
	for name, v := range values {
		out[strings.ToLower(name)] = strings.Join(v, ",")
	}
	return out
}

// compare is a writer that knows what should be written to it.
type compare struct {
	want   []byte
	differ bool
}

func (c *compare) Write(p []byte) (int, error) {
	if bytes.HasPrefix(c.want, p) {
		c.want = c.want[len(p):]
	} else {
		c.differ = true
	}
	return len(p), nil
}

func (c *compare) result() *bool {
	same := !c.differ && len(c.want) == 0
	return &same
}

// limited keeps the first bytes that are written to it.
type limited struct {
	bytes.Buffer
	left int
}

func (l *limited) Write(p []byte) (int, error) {
	keep := min(l.left, len(p))
	l.left -= keep
	l.Buffer.Write(p[:keep])
	return len(p), nil
}
