{{/* The secrets that the server reads, by the name of their volume. */}}
{{- define "sd-service.server.secrets" -}}
{{- if .Values.apiKeys.existingSecret }}
api-keys: {name: {{ .Values.apiKeys.existingSecret | quote }}, keys: [{{ .Values.apiKeys.key | quote }}]}
{{- end }}
{{- if .Values.tls.enabled }}
tls: {name: {{ include "sd-service.tls.secret" . | quote }}, keys: [tls.crt, tls.key]}
{{- if .Values.tls.clientCaSecret }}
client-ca: {name: {{ .Values.tls.clientCaSecret | quote }}, keys: [ca.crt]}
{{- end }}
{{- end }}
{{- if .Values.signing.existingSecret }}
signing: {name: {{ .Values.signing.existingSecret | quote }}, keys: [tls.crt, tls.key]}
{{- end }}
{{- end -}}

{{- define "sd-service.server.tritonUrl" -}}
{{- if include "sd-service.triton.sidecar" . -}}
127.0.0.1:8001
{{- else if .Values.triton.enabled -}}
{{ include "sd-service.triton.fullname" . }}:8001
{{- else -}}
{{ .Values.triton.url }}
{{- end -}}
{{- end -}}

{{/* The settings of `sdserver serve`, by their names. */}}
{{- define "sd-service.server.settings" -}}
{{- $server := .Values.server -}}
host: 0.0.0.0
port: 50051
health_port: 50052
triton_url: {{ include "sd-service.server.tritonUrl" . | quote }}
model_repository: /models
{{- with .Values.engines.default }}
default_engine: {{ . | quote }}
{{- end }}
max_active: {{ $server.maxActive }}
max_queued: {{ $server.maxQueued }}
parallel_calls: {{ $server.parallelCalls | default (include "sd-service.triton.least" .) }}
max_generation_seconds: {{ $server.maxGenerationSeconds }}
drain_seconds: {{ $server.drainSeconds }}
{{- with $server.maxConnectionAgeSeconds }}
max_connection_age_seconds: {{ . }}
max_connection_age_grace_seconds: {{ $server.maxConnectionAgeGraceSeconds }}
{{- end }}
text_cache_mb: {{ $server.textCacheMb }}
log_level: {{ $server.logLevel | quote }}
log_format: json
{{- if .Values.metrics.enabled }}
metrics_host: 0.0.0.0
metrics_port: 9464
{{- end }}
{{- if .Values.traces.enabled }}
traces: "true"
{{- end }}
{{- with .Values.safety.model }}
safety_model: {{ . | quote }}
{{- end }}
{{- with .Values.safety.mode }}
safety_mode: {{ . | quote }}
{{- end }}
{{- with .Values.safety.promptBlockList }}
{{- if .existingConfigMap }}
prompt_block_list: /etc/sd-service/block-list/{{ .key }}
{{- end }}
{{- end }}
{{- if .Values.apiKeys.existingSecret }}
api_keys: /etc/sd-service/api-keys/{{ .Values.apiKeys.key }}
{{- end }}
{{- if .Values.tls.enabled }}
tls_certificate: /etc/sd-service/tls/tls.crt
tls_private_key: /etc/sd-service/tls/tls.key
{{- if .Values.tls.clientCaSecret }}
tls_client_ca: /etc/sd-service/client-ca/ca.crt
{{- end }}
{{- end }}
{{- if .Values.signing.existingSecret }}
c2pa_certificates: /etc/sd-service/signing/tls.crt
c2pa_private_key: /etc/sd-service/signing/tls.key
c2pa_algorithm: {{ .Values.signing.algorithm | quote }}
{{- with .Values.signing.timestampAuthority }}
c2pa_timestamp_authority: {{ . | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "sd-service.server.env" -}}
{{- $settings := include "sd-service.server.settings" . | fromYaml -}}
{{- range $name, $value := merge $settings .Values.server.settings }}
{{- /* Numbers come as floats: 1e+06 would be no integer. */}}
- {name: SDSERVER_{{ $name | upper }}, value: {{ kindIs "float64" $value | ternary ($value | toJson) $value | toString | quote }}}
{{- end }}
{{- if .Values.traces.enabled }}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- {name: OTEL_SERVICE_NAME, value: {{ include "sd-service.fullname" . | quote }}}
- {name: OTEL_RESOURCE_ATTRIBUTES, value: "k8s.namespace.name={{ .Release.Namespace }},k8s.pod.name=$(POD_NAME)"}
- {name: OTEL_EXPORTER_OTLP_ENDPOINT, value: {{ .Values.traces.endpoint | quote }}}
- {name: OTEL_TRACES_SAMPLER, value: parentbased_traceidratio}
- {name: OTEL_TRACES_SAMPLER_ARG, value: {{ .Values.traces.ratio | quote }}}
{{- end }}
{{- with .Values.server.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}
